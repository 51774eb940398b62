"""`doctor`: what it finds of this machine and a model; with `--url` what steps cost on a running server, or why that
isn't known (real routes, recorded engines).
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from tests.support.application import serving
from vllm_flying.cli import doctor
from vllm_flying.cli.main import run
from vllm_flying.controller.cost_model import StepCost
from vllm_flying.frontend.board import BoardGroup, BoardState
from vllm_flying.http.routes import build_router

KEY = "a secret"
PROBES = {1: [(0, 1, 0.0204), (31, 1, 0.0328), (0, 128, 0.0712)], 2: [(0, 1, 0.0123), (31, 1, 0.0216), (0, 128, 0.0504)]}


class Recorded:
    """Two engines apart: both have probed, the first has run 40 steps by itself."""

    def __init__(self, policy: str, probed: bool) -> None:
        self.settings, self.engines = SimpleNamespace(policy=policy), self
        self._costs = [{width: StepCost() for width in PROBES} for _ in range(2)] if probed else [{}, {}]
        for costs in self._costs:
            for width, cost in costs.items():
                cost.seed(PROBES[width])
        for index in range(40 if probed else 0):
            prompt_tokens, decodes = 64 * (index % 2), index % 5
            self._costs[0][1].learn(prompt_tokens, decodes, 0.02 + 0.0004 * (prompt_tokens + decodes))

    async def ready(self) -> BoardState:
        return BoardState(1, 1, (BoardGroup((0,), 1000), BoardGroup((1,), 1000)), None)

    async def call_all(self, operation: str) -> list[dict[str, Any]]:
        assert operation == "status"
        return [
            {
                "engine": engine, "state": "serving", "group": [engine], "pages": {}, "scheduled_tokens": 0, "running": 0,
                "waiting": 0, "paused": 0, "kv_tokens_capacity": 1000, "kv_tokens_used": 0, "pace": 1.0,
                "costs": {str(width): cost.report() for width, cost in costs.items()},
                "probes": {str(width): PROBES[width] for width in costs},
            }
            for engine, costs in enumerate(self._costs)
        ]  # fmt: skip


@contextmanager
def server(policy: str, probed: bool) -> Iterator[str]:
    app = FastAPI()
    app.state.args, app.state.flying_router = Namespace(api_key=[KEY]), Recorded(policy, probed)
    app.include_router(build_router(app))
    with serving(app) as url:
        yield url


@pytest.fixture
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report on this machine is left out."""
    for part in ("_versions", "_plugins", "_seams"):
        monkeypatch.setattr(doctor, part, list)
    monkeypatch.setattr(doctor, "_binding", lambda arguments: [])
    monkeypatch.setenv("VLLM_API_KEY", KEY)


def model(directory: Path, **fields: Any) -> str:
    """A directory with a config and a megabyte of weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 256, "torch_dtype": "bfloat16", **fields,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(bytes(1_000_000))
    return str(directory)


def report(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> list[str]:
    assert run(["doctor", *arguments]) == status
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("nothing_else")
def test_costs_are_printed_for_every_engine_and_width(capsys: pytest.CaptureFixture[str]) -> None:
    with server("auto", probed=True) as url:
        lines = report(capsys, "--url", url)
    about = [line for line in lines if line.startswith("[ok  ] engine ")]
    assert len(about) == 8 and lines[-1] == "Nothing keeps the server from starting."
    assert about[0] == (
        "[ok  ] engine 0, width 1: a step takes 20.4 ms with 1 request, 23.2 ms with 8 requests, 32.8 ms with 32 requests, "
        "71.3 ms with 128 requests, a prompt token 0.4 ms "
        "(learned from 40 steps)"
    )
    assert about[1] == (
        "[ok  ] engine 0, width 1: the probe at start ran steps of 1 request 20.4 ms, "
        "31 prompt tokens and 1 request 32.8 ms, 128 requests 71.2 ms"
    )
    assert about[6].startswith("[ok  ] engine 1, width 2: a step takes 12.3 ms with 1 request")
    assert about[6].endswith("a prompt token 0.3 ms (probed only, no step was learned from yet)")


@pytest.mark.usefixtures("nothing_else")
@pytest.mark.parametrize(("policy", "says"), [
    ("manual", """start it with --additional-config '{"flying": {"policy": "auto"}}'"""), ("auto", "ask again"),
])  # fmt: skip
def test_a_server_that_knows_none_says_why(capsys: pytest.CaptureFixture[str], policy: str, says: str) -> None:
    with server(policy, probed=False) as url:
        (line,) = report(capsys, "--url", url)[1:-1]
    assert line.startswith("[warn] no step costs") and f"policy `{policy}`" in line and says in line


@pytest.mark.usefixtures("nothing_else")
def test_the_key_is_asked_for_and_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with server("auto", probed=True) as url:
        lines = report(capsys, "--url", url, "--api-key", "another", status=1)
    assert lines[1].startswith("[BAD ] server: HTTP 401") and lines[-1] == "1 problem(s), marked BAD."
    lines = report(capsys, "--url", "http://127.0.0.1:9", status=1)
    assert "no server answers at http://127.0.0.1:9" in lines[1]


@pytest.mark.usefixtures("nothing_else")
def test_without_a_url_no_server_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys) == ["vllm-flying doctor", "Nothing keeps the server from starting."]


def test_this_machine_and_a_model_are_looked_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "flying")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0|1")
    lines = report(capsys, model(tmp_path), "-dp", "4", "-tp", "1")
    assert lines[-1] == "Nothing keeps the server from starting."
    text = "\n".join(lines)
    for found in (
        "vllm 0.3", "entry point flying in vllm.endpoint_plugins: found", "[ok  ] VLLM_PLUGINS=flying", "vLLM symbols are as",
        "VLLM_CPU_OMP_THREADS_BIND='0|1|0|1'", "LlamaForCausalLM, attention heads 4, KV heads 4, intermediate size 128",
        "weights: 1.0 MB as stored, once per engine for all layouts, 1.0 MB a worker",
        # 2 (K and V) x heads x 16 per head x 2 bytes x 2 layers
        "groups of 1: TP 1, 512 KV bytes per token and worker", "groups of 4: TP 4, 128 KV bytes per token and worker",
    ):  # fmt: skip
        assert found in text, text


@pytest.mark.parametrize(
    ("fields", "engines", "text"),
    [
        ({}, "8", "[BAD ] groups of 8: attention heads = 4 is not a multiple of the tensor-parallel degree 8"),
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}, "2", "[BAD ] mixture-of-experts"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}}, "2",
         "[BAD ] quantised weights"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}, "2",
         "[warn] a sliding window of 64 tokens"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_else")
def test_a_model_that_can_not_change_its_layout_is_said_before_the_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, fields: dict[str, Any], engines: str, text: str
) -> None:
    lines = report(capsys, model(tmp_path, **fields), "-dp", engines, status=int("BAD" in text))
    assert any(line.startswith(text) for line in lines), lines


@pytest.mark.parametrize(
    ("binding", "found"),
    [("auto", "[warn] VLLM_CPU_OMP_THREADS_BIND is auto"), ("0|1|2", "[BAD ] VLLM_CPU_OMP_THREADS_BIND='0|1|2' has 3 entries for 2")],
)
def test_the_binding_must_have_an_entry_per_worker(
    monkeypatch: pytest.MonkeyPatch, binding: str, found: str
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    findings = doctor._binding(Namespace(data_parallel_size=2, tensor_parallel_size=1))
    assert any(f"[{mark}] {text}".startswith(found) for mark, text in findings)
