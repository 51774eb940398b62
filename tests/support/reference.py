"""What plain stock vLLM says: tokens and teacher-forced NLL, from offline engines in a process of their own.

Their engine cores run in that process too (vLLM's own VLLM_ENABLE_V1_MULTIPROCESSING=0), as does the worker of one that
has no others: every process less is some 15 s less of a core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_flying.cli.imports import put_full_collections_off

put_full_collections_off()  # here, so that spawned workers do it too: they import this module first

LIMIT_S = 500.0


class Reference:
    """Stock vLLM in static layouts, one after the other. `specs`: tensor-parallel degree -> what to run there.

    That is `requests`, a list of (prompt token ids or text, sampling options), and `nll_prompts`. Begins at once, beside whatever
    the test does next.
    """

    def __init__(self, model: Path, scratch: Path, specs: dict[int, dict[str, Any]]) -> None:
        question = scratch / "reference.json"
        question.write_text(json.dumps(specs))
        self._answer = question.with_suffix(".answer.json")
        self._log = question.with_suffix(".log")
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [sys.executable, "-m", "tests.support.reference", str(model), str(question)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def result(self, degree: int = 1) -> dict[str, Any]:
        """`tokens` and `nll`, lists in the order of the spec of this degree."""
        code = self._process.wait(timeout=LIMIT_S)
        assert code == 0, f"the stock reference failed:\n{self._log.read_text()[-6000:]}"
        result: dict[str, Any] = json.loads(self._answer.read_text())[str(degree)]
        return result


def main() -> None:
    """In the reference's own process."""
    model, question = sys.argv[1:]
    specs = json.loads(Path(question).read_text())
    # The degree 1 comes last: its worker makes this process's own process group.
    answers = {degree: run(model, int(degree), specs[degree]) for degree in sorted(specs, key=int, reverse=True)}
    Path(question).with_suffix(".answer.json").write_text(json.dumps(answers))


def run(model: str, tensor_parallel_size: int, spec: dict[str, Any]) -> dict[str, Any]:
    """One static layout, from start to end."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=2048,
        kv_cache_memory_bytes=32 << 20,
        block_size=32,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    requests = spec.get("requests", [])
    outputs = llm.generate(
        [{"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt, _ in requests],
        [sampling_params(options) for _, options in requests],
        use_tqdm=False,
    )
    nll_prompts = spec.get("nll_prompts", [])
    scored = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in nll_prompts],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    llm.llm_engine.engine_core.shutdown()
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "nll": [
            [-entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
            for output, prompt in zip(scored, nll_prompts, strict=True)
        ],
    }


def sampling_params(options: dict[str, Any]) -> Any:
    """As vLLM's server makes them of a request's fields."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    grammar = options.get("structured_outputs")
    return SamplingParams.from_optional(
        **{**options, "structured_outputs": StructuredOutputsParams(**grammar) if grammar else None}
    )


if __name__ == "__main__":
    main()
