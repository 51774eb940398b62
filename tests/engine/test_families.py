"""Model families, alone and merged, with tiles and with views, against transformers. Mistral: test_wide_engines."""

from __future__ import annotations

from pathlib import Path
from shutil import which

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.load import random_prompts
from tests.support.server import Server
from tests.support.transformers_reference import transformers_nll

pytestmark = pytest.mark.engine

PROMPTS = random_prompts(31, (45, 90))
# One is compiled, as vLLM does by default; Inductor needs a compiler for that.
CASES = [
    ("qwen2", "tiles", which("g++") is not None),
    ("qwen3", "views", False),
    ("gemma", "tiles", False),
    ("phi", "tiles", False),
    ("gpt2", "tiles", False),
]


@pytest.mark.parametrize(("family", "weights", "compiled"), CASES)
def test_family(checkpoints: Path, tmp_path: Path, family: str, weights: str, compiled: bool) -> None:
    model = make_checkpoint(family, checkpoints)
    compile_flag = ("--no-enforce-eager",) if compiled else ()
    arguments = ("--max-model-len", "1024", "--api-server-count", "1", *compile_flag)
    with Server(model, tmp_path / "log", *arguments, settings={"weights": weights}) as server:
        alone = [server.nll(prompt) for prompt in PROMPTS]
        tokens = [server.tokens(prompt, 20) for prompt in PROMPTS]
        for prompt, nll in zip(PROMPTS, alone, strict=True):
            assert nll == pytest.approx(transformers_nll(model, prompt), abs=2e-3, rel=1e-3)
        server.switch([[0, 1]])
        for prompt, nll, expected in zip(PROMPTS, alone, tokens, strict=True):
            assert server.nll(prompt) == pytest.approx(nll, abs=1e-4, rel=1e-5)
            assert server.tokens(prompt, 20) == expected
        server.switch([[0], [1]])
        assert [server.tokens(prompt, 20) for prompt in PROMPTS] == tokens
