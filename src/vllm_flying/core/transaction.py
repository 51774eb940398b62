"""A switch of layout as a state machine: prepare, move, prove, commit; or back to where it was.

Pure: no torch, no vllm, no clock, no I/O. The machine says which engine gets which call next; the switcher sends the
calls and reports replies and failures. Only engines whose group changes take part, and those whose pages hold the KV
of requests that migrate. Nothing in the old layout is given up before every engine is at rest, and nothing is
announced before the workers have proved the new layout. With the method `migrate`, begun requests are admitted in the
new layout and their KV is copied before the proof, and given up in the old one after it (see `core.journey`). `soft` is
`migrate` after a drain: engines let finish what had begun before, each serving again as soon as it is done with that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from vllm_flying.core.journey import Call, Journey
from vllm_flying.core.pauses import Pausing
from vllm_flying.core.pricing import MoveRates
from vllm_flying.core.topology import Group, Layout, aligned_group


class Phase(Enum):
    """Where a switch stands."""

    DRAIN = "drain"
    PREPARE = "prepare"
    MOVE = "move"
    ADMIT = "admit"
    TRANSFER = "transfer"
    PROVE = "prove"
    RELEASE = "release"
    COMMIT = "commit"
    EXTEND = "extend"
    COMMITTED = "committed"
    MOVE_BACK = "move back"
    CANCEL = "cancel"
    ROLLED_BACK = "rolled back"
    FAILED = "failed"


FINAL = frozenset({Phase.COMMITTED, Phase.ROLLED_BACK, Phase.FAILED})
UNDOABLE = frozenset({Phase.MOVE, Phase.ADMIT, Phase.TRANSFER, Phase.PROVE})
# The new layout is proved: a failure in one of these is noted, and the rest is carried through.
FORWARD = frozenset({Phase.RELEASE, Phase.COMMIT, Phase.EXTEND})
UNDOING = frozenset({Phase.MOVE_BACK, Phase.CANCEL})
FOLLOWING = {
    Phase.DRAIN: Phase.PREPARE,
    Phase.PREPARE: Phase.MOVE,
    Phase.MOVE: Phase.ADMIT,
    Phase.ADMIT: Phase.TRANSFER,
    Phase.TRANSFER: Phase.PROVE,
    Phase.PROVE: Phase.RELEASE,
    Phase.RELEASE: Phase.COMMIT,
    Phase.COMMIT: Phase.EXTEND,
    Phase.EXTEND: Phase.COMMITTED,
    Phase.MOVE_BACK: Phase.CANCEL,
    Phase.CANCEL: Phase.ROLLED_BACK,
}


@dataclass
class SwitchTransaction:
    """One switch from `source` to `target` under `epoch`. Feed it replies; it returns the next calls."""

    epoch: int
    source: Layout
    target: Layout
    method: str
    phase: Phase = Phase.DRAIN
    failure: str | None = None
    rates: MoveRates = field(default_factory=MoveRates)
    """What moving costs, for the method `auto`."""
    pausing: Pausing = field(default_factory=Pausing)
    last_resort: bool = False
    """Begun requests without room are computed again instead of waiting for some."""
    urgent_follows: bool = False
    """The switch is for an urgent request, which is sent as soon as the new layout stands."""
    drained: dict[int, dict[str, Any]] = field(default_factory=dict)
    prepared: dict[int, dict[str, Any]] = field(default_factory=dict)
    proof: list[dict[str, Any]] = field(default_factory=list)
    committed: dict[int, dict[str, Any]] = field(default_factory=dict)
    journey: Journey = field(init=False)
    _proved: bool = False
    _joined: set[int] = field(default_factory=set)
    _waiting: set[int] = field(default_factory=set)
    _failed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        rates = self.rates if self.method == "auto" else None
        self.journey = Journey(self.epoch, self.target, rates, self.last_resort, self.pausing)

    @property
    def migrates(self) -> bool:
        """Whether begun requests move into the new layout."""
        return self.method in ("migrate", "auto", "soft")

    @property
    def engines(self) -> tuple[int, ...]:
        """Engines that take part. A migration into the present layout fetches what is paused anywhere."""
        changed = self.source.changed_engines(self.target)
        if self.migrates and not changed:
            return tuple(range(self.source.num_engines))
        return tuple(sorted({*changed, *self._joined}))

    @property
    def is_over(self) -> bool:
        """No more calls will come."""
        return self.phase in FINAL

    @property
    def is_bounded(self) -> bool:
        """Whether the caller's time limit applies. What undoes a switch or carries it through must be awaited."""
        return self.failure is None and self.phase not in FORWARD | UNDOING

    @property
    def holds(self) -> bool:
        """The new layout stands, though perhaps something failed after its proof."""
        return self.is_over and self._proved

    def serving_until_merged(self, width: int) -> tuple[int, ...]:
        """Engines that are done with their old requests, and serve until they are merged into a group of `width`."""
        engines = sorted(self.drained) if self.phase is Phase.DRAIN else []
        return tuple(e for e in engines if len(self.source.group_of(e)) < len(self.target.group_of(e)) == width)

    @property
    def waiting_for(self) -> tuple[int, ...]:
        """Engines whose reply to the present phase is outstanding."""
        return tuple(sorted(self._waiting))

    def start(self) -> list[Call]:
        """The first calls; none if the layouts are equal."""
        return self._enter(Phase.DRAIN)

    def replied(self, engine: int, result: Any) -> list[Call]:
        """An engine did what the present phase asked for."""
        self._waiting.discard(engine)
        if self.phase is Phase.DRAIN:
            self.drained[engine] = result
        elif self.phase is Phase.PREPARE:
            self.prepared[engine] = result
            self.journey.largest_aside = max(self.journey.largest_aside, result.get("largest_aside", 0))
        elif self.phase is Phase.MOVE:
            self.journey.moved(engine, result)
            self.proof.extend(result["proof"])
        elif self.phase is Phase.ADMIT:
            self.journey.admitted(engine, result)
        elif self.phase is Phase.TRANSFER:
            self.journey.transferred(result)
            self.proof.extend(result["proof"])
        elif self.phase is Phase.PROVE:
            self.proof.extend(result)
        elif self.phase is Phase.RELEASE:
            self.journey.released(engine, result)
        elif self.phase is Phase.COMMIT:
            self.committed[engine] = result
        elif self.phase is Phase.EXTEND:
            self.committed[engine] |= result
        return self._advance()

    def failed(self, engine: int | None, reason: str) -> list[Call]:
        """An engine refused, or (engine None) the time limit passed. Before the release the switch is undone.

        While engines are moving, the others' replies are awaited first: what is undone must be known. From the release
        on the switch goes on with those that do their part, and ends as failed.
        """
        if self.is_over:
            return []
        if self.failure is None:
            self.failure = reason
        if engine is not None:
            self._failed.add(engine)
            self._waiting.discard(engine)
        if self.phase in (Phase.DRAIN, Phase.PREPARE):
            return self._enter(Phase.CANCEL)
        if engine is None:
            self._failed.update(self._waiting)
            self._waiting.clear()
        return self._advance()

    def _advance(self) -> list[Call]:
        if self._waiting:
            return []
        if self.phase in UNDOABLE and self.failure is not None:
            return self._enter(Phase.MOVE_BACK)
        if self.phase is Phase.PREPARE:
            joining = self._engines_with_kv_to_move()
            if joining:
                self._joined |= joining
                self._waiting = set(joining)
                return [self._prepare(engine) for engine in sorted(joining)]
            problem = self._lack_of_pages()
            if problem:
                return self.failed(None, problem)
        problem = self._stranded() if self.phase is Phase.ADMIT else None
        if self.phase is Phase.PROVE:
            problem = self._broken_proof()
        if problem:
            self.failure = problem
            return self._enter(Phase.MOVE_BACK)
        if self._failed and (self.phase in UNDOING or self.phase is Phase.EXTEND):
            self.phase = Phase.FAILED
            return []
        return self._enter(FOLLOWING[self.phase])

    def _enter(self, phase: Phase) -> list[Call]:
        self.phase = phase
        self._proved = self._proved or phase in FORWARD
        if phase in UNDOING:
            self._failed = set()  # what failed until here is what these phases mend
        calls = self._calls(phase)
        self._waiting = {call.engine for call in calls}
        if not calls and phase not in FINAL:
            return self._advance()
        return calls

    def _calls(self, phase: Phase) -> list[Call]:
        if phase is Phase.DRAIN:
            draining = self.source.changed_engines(self.target) if self.method == "soft" else ()
            return [Call(engine, "drain", {"epoch": self.epoch}) for engine in sorted(draining)]
        if phase is Phase.PREPARE:
            return [self._prepare(engine) for engine in self.engines]
        if phase is Phase.MOVE:
            return self._moves(self.target)
        if phase is Phase.ADMIT:
            return self.journey.admissions(self._changed_groups(self.target))
        if phase is Phase.TRANSFER:
            return self.journey.transfers(self._changed_groups(self.target))
        if phase is Phase.PROVE:
            return [] if self.proof else [Call(group[0], "prove", {}) for group in self._changed_groups(self.target)]
        if phase is Phase.RELEASE:
            return self.journey.releases(self.engines) if self._may_reclaim() else []
        if phase is Phase.COMMIT:
            return [self._commit(engine) for engine in self.engines]
        if phase is Phase.EXTEND:
            return self.journey.extensions(self.committed)
        if phase is Phase.MOVE_BACK:
            return self._moves(self.source)
        if phase is Phase.CANCEL:
            return [Call(e, "cancel", {"epoch": self.epoch}) for e in self.engines]
        return []

    def _prepare(self, engine: int) -> Call:
        rates = [self.rates.rounds_s, self.rates.seconds_per_byte]
        arguments = {"epoch": self.epoch, "method": self.method, "rates": rates}
        target = self.target.group_of(engine)
        follow = self.migrates and target != self.source.group_of(engine)
        return Call(engine, "prepare", {**arguments, "prefixes_to": len(target) if follow else 0})

    def _commit(self, engine: int) -> Call:
        arguments = {"epoch": self.epoch, "recipients": self.recipients(engine), "urgent_follows": self.urgent_follows}
        return Call(engine, "commit", {**arguments, **self.journey.outcome(engine)})

    def _moves(self, layout: Layout) -> list[Call]:
        offering = self.phase is Phase.MOVE and self.migrates and self._may_offer()
        proving = self.phase is Phase.MOVE and not offering
        carrying = self.carries_prefixes
        arguments = {"epoch": self.epoch, "offering": offering, "proving": proving, "carrying": carrying}
        arguments["undoing"] = self.phase is Phase.MOVE_BACK
        return [
            Call(engine, "move", {**arguments, "group": list(group), "lease": self.lease(group)})
            for group in self._changed_groups(layout)
            for engine in group
        ]

    def _may_offer(self) -> bool:
        """Engines prove as they move, or once KV is copied, in the same call: the proof is no round of its own.

        They offer requests where there may be something to copy.
        """
        begun = any(reply["begun"] for reply in self.prepared.values())
        return self._something_is_kept() or begun or self.carries_prefixes

    def _something_is_kept(self) -> bool:
        """Engines have unfinished requests, or pages that requests left in former layouts."""
        return any(reply.get("paused_widths") for reply in self.prepared.values())

    def _changed_groups(self, layout: Layout) -> list[Group]:
        changed = set(self.engines)
        return [group for group in layout.groups if group[0] in changed]

    def _engines_with_kv_to_move(self) -> set[int]:
        """Engines not prepared yet whose pages hold KV of a prepared engine's requests, or who share their groups."""
        if not self.migrates:
            return set()
        wanted, grown = set(self.prepared), True
        while grown:
            before = len(wanted)
            for engine in sorted(wanted):
                wanted.update(self.source.group_of(engine), self.target.group_of(engine))
                for width in self.prepared.get(engine, {}).get("paused_widths", ()):
                    wanted.update(aligned_group(engine, width))
            grown = len(wanted) > before
        return wanted - set(self.prepared)

    def _may_reclaim(self) -> bool:
        """Requests have left former layouts, or only their pages are left there, or prefixes are held."""
        return bool(self.journey.arrived) or self.carries_prefixes or (self.migrates and self._something_is_kept())

    def lease(self, group: Group) -> int:
        """Pages that each member lends to `group`: as many as every member has free once its old group is left."""
        if len(group) == 1:
            return 0
        return min(self._free_pages(engine) + self._pages_let_go(engine) for engine in group)

    def _free_pages(self, engine: int) -> int:
        """Pages that an engine has free once its old group is left."""
        leader = self.source.group_of(engine)[0]
        return int(self.prepared[engine]["free_pages"] + self.prepared[leader]["returnable_pages"])

    def _pages_let_go(self, engine: int) -> int:
        """Further ones, which cached prefixes hold that stay after all."""
        leader = self.source.group_of(engine)[0]
        return 0 if self.carries_prefixes else int(self.prepared[leader].get("prefix_pages", 0))

    @property
    def carries_prefixes(self) -> bool:
        """Hot prefixes follow where, beside what they hold, every changing group has room for all begun requests at once.

        So none of these finds less room than without them.
        """
        replies = self.prepared.values()
        if not self.migrates or not any(reply.get("prefix_pages") for reply in replies):
            return False
        requests, tokens = (sum(reply["kept"][i] for reply in replies) for i in (0, 1))
        for group in self._changed_groups(self.target):
            page_tokens = self.prepared[group[0]]["page_tokens"] * len(group)
            free = min(self._free_pages(engine) for engine in group)
            if free * page_tokens <= tokens + requests * page_tokens:
                return False
        return True

    def recipients(self, engine: int) -> list[int]:
        """Engines that run the fresh requests which `engine` kept aside."""
        target, source = self.target.group_of(engine), self.source.group_of(engine)
        if engine != target[0]:
            return [target[0]]
        if engine == source[0] and len(source) > len(target):
            others = [group[0] for group in self.target.groups if group[0] in source and group[0] != engine]
            return [engine, *others]
        return [engine]

    def _lack_of_pages(self) -> str | None:
        for group in self._changed_groups(self.target):
            if len(group) > 1 and self.lease(group) == 0:
                return (
                    f"group {list(group)} would have no KV pages: paused requests hold all of a member's; "
                    "drain instead of pausing, or wait until some finish"
                )
        return None

    def _stranded(self) -> str | None:
        """Begun requests would all be left behind in a layout that is no more, maybe for ever."""
        if self.source == self.target or not self.journey.unplaced or self.journey.arrived:
            return None
        return (
            f"none of {self.journey.unplaced} begun requests finds room in the new layout, whose free pages are too "
            "few, or whose groups are too small for what they may come to; wait until some finish, or drain instead of "
            "migrating"
        )

    def _broken_proof(self) -> str | None:
        changed = set(self.engines)
        proved = {(p["engine"], p["tp_size"]) for p in self.proof}
        for group in self.target.groups:
            if group[0] not in changed:
                continue
            sizes = {size for engine, size in proved if engine in group}
            ranks = sorted(p["tp_rank"] for p in self.proof if p["engine"] in group)
            if len(sizes) != 1 or {e for e, _ in proved if e in group} != set(group):
                return f"workers of group {list(group)} prove tensor-parallel sizes {sorted(sizes)}, not one for all"
            if len(group) > 1 and ranks != list(range(next(iter(sizes)))):
                return f"workers of group {list(group)} prove ranks {ranks}"
        return None
