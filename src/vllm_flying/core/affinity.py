"""Which engines have lately served the beginning of a prompt, and so may have its KV cached.

Pure: no torch, no vllm. A guess, not a record of any cache: a wrong one costs a prefill that was due anyway, and never
more than `SLACK` requests of imbalance. Entries name engines: a merged group is asked for what any member served, and
an engine's own prefixes are still with it after a split.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from vllm_flying.core.routing import GroupState

CHUNK_TOKENS = 64
# Prompts that agree in so many chunks (8192 tokens) are taken for the same.
MOST_CHUNKS = 128
# A few MB: some 120 prompts of that length, or thousands of short ones.
MOST_ENTRIES = 16_384
# Requests per engine that a group may have more than the least loaded one. Two are soon served; a prefix that everyone
# has is, after as many requests more, known to the next group as well.
SLACK = 2.0

Prefix = tuple[int, ...]
"""One key per full chunk from the beginning of a prompt; each stands for all tokens up to the end of its chunk."""


def prefix_keys(tokens: Sequence[int], salt: str | None = None) -> Prefix:
    """Keys of a prompt. Prompts of another cache salt share no KV, hence no key."""
    keys, key = [], hash(salt)
    for start in range(0, min(len(tokens) // CHUNK_TOKENS, MOST_CHUNKS) * CHUNK_TOKENS, CHUNK_TOKENS):
        key = hash((key, *tokens[start : start + CHUNK_TOKENS]))
        keys.append(key)
    return tuple(keys)


class PrefixAffinity:
    """Remembers who served which prefix; the ones used longest ago are forgotten first."""

    def __init__(self, most_entries: int = MOST_ENTRIES, slack: float = SLACK) -> None:
        self._most_entries = most_entries
        self._slack = slack
        self._served: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._served)

    def remember(self, prefix: Prefix, engine: int) -> None:
        """An engine was given a request with this prefix."""
        # The longest first: of one prompt's keys the shortest, which most others share, are forgotten last.
        for key in reversed(prefix):
            others = (other for other in self._served.pop(key, ()) if other != engine)
            self._served[key] = (engine, *others)
        while len(self._served) > self._most_entries:
            self._served.popitem(last=False)

    def preferred(self, groups: Sequence[GroupState], prefix: Prefix) -> GroupState | None:
        """Of `groups`, which can all take the request, the one that served the longest part of its prefix.

        None if none has served any, or all that have are loaded more than the slack above the least loaded one.
        """
        least = min((group.load_per_engine for group in groups), default=0.0)
        near = [group for group in groups if group.load_per_engine <= least + self._slack]
        for key in reversed(prefix):
            served = self._served.get(key, ())
            matching = [group for group in near if any(engine in group.engines for engine in served)]
            if matching:
                return min(matching, key=lambda group: (group.load_per_engine, group.leader))
        return None
