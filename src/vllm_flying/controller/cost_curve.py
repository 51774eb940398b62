"""Seconds of a step in a layout, by its prompt tokens and its decoding requests.

Pure. A step of few requests mostly reads the weights, one of many computes: what one more request adds grows with how many
there are, so the curve is straight from one of `KNEES` to the next and never gets less steep. With a single straight line
full batches would say what a few requests cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Decoding requests beyond which each further one may cost more.
KNEES = (0, 8, 32, 128)


@dataclass(frozen=True)
class CostCurve:
    """What a step takes, all in seconds."""

    step_s: float
    """Of any step."""
    prompt_token_s: float
    decode_s: tuple[float, ...]
    """Of a decoding request: of each beyond the first of `KNEES`, how much more beyond the second, and so on."""

    @classmethod
    def straight(cls, step_s: float, prompt_token_s: float, decode_s: float) -> CostCurve:
        """Every decoding request costs the same."""
        return cls(step_s, prompt_token_s, (decode_s,))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CostCurve:
        """From plain values, as they travel between processes."""
        return cls(fields["step_s"], fields["prompt_token_s"], tuple(fields["decode_s"]))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**asdict(self), "decode_s": list(self.decode_s)}

    def of(self, prompt_tokens: float, decodes: float) -> float:
        """Seconds of a step."""
        beyond = sum(more * (decodes - knee) for knee, more in zip(KNEES, self.decode_s, strict=False) if decodes > knee)
        return self.step_s + self.prompt_token_s * prompt_tokens + beyond

    def most_per_s(self, decodes: float) -> float:
        """Tokens per second that so many decoding requests come to, or as many of them as come to most."""
        fullest = min(decodes, self._fullest)
        return fullest / self.of(0, fullest)

    @property
    def _fullest(self) -> float:
        """Decoding requests beyond which more come to no more tokens per second."""
        at_none = self.step_s  # what the straight piece would cost with no request
        for knee, more in zip(KNEES, self.decode_s, strict=False):
            at_none -= more * knee
            if at_none < 0.0:
                return knee
        return math.inf

    def at_pace(self, factor: float) -> CostCurve:
        """With everything so many times as slow."""
        return CostCurve(factor * self.step_s, factor * self.prompt_token_s, tuple(factor * more for more in self.decode_s))

    def plus(self, step_s: float, decode_s: float) -> CostCurve:
        """With so much more for any step and for every decoding request."""
        return CostCurve(self.step_s + step_s, self.prompt_token_s, (self.decode_s[0] + decode_s, *self.decode_s[1:]))
