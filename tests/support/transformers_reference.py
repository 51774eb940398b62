"""Teacher-forced NLL by transformers, in float32: a reference that shares no code with vLLM."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=2)
def _load(model: Path):  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def transformers_nll(model: Path, prompt: list[int]) -> list[float]:
    """Negative log-likelihood of every prompt token after the first."""
    import torch

    with torch.inference_mode():
        logits = _load(model)(torch.tensor([prompt])).logits[0, :-1]
    scores = torch.log_softmax(logits.float(), dim=-1)
    return [-scores[position, token].item() for position, token in enumerate(prompt[1:])]
