"""Real servers on CPU for tests: started in a process group of their own, waited for, stopped and checked to be gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

START_LIMIT_S = 400.0
STOP_LIMIT_S = 40.0
V2_INTERPRETER = Path(__file__).parent / "v2_interpreter"


class Server:
    """A running server. `flying` starts it with the plugin, by default with a controller that never acts."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *arguments: str,
        engines: int = 2,
        flying: bool = True,
        model_runner_v2: bool = False,
        kv_bytes: int = 16 << 20,
        environment: dict[str, str] | None = None,
        api_key: str | None = None,
        workers_per_engine: int = 1,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.model = str(model)
        self.engines = engines
        module = ["vllm_flying.cli.main", "serve"] if flying else ["vllm.entrypoints.openai.api_server", "--model"]
        self._command = [
            sys.executable, "-m", *module, str(model),
            "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(self.port),
            "--data-parallel-size", str(engines), "--block-size", "32", "--kv-cache-memory-bytes", str(kv_bytes),
            *(["--api-key", api_key] if api_key else []), *arguments,
            *(["--additional-config", json.dumps({"flying": {"policy": "manual", **(settings or {})}})] if flying else []),
        ]  # fmt: skip
        self._environment = {**os.environ, **_environment(engines * workers_per_engine), **(environment or {})}
        if model_runner_v2:
            self._environment |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
            self._environment["PYTHONPATH"] = f"{V2_INTERPRETER}:{os.environ.get('PYTHONPATH', '')}"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.client = httpx.Client(base_url=self.url, timeout=300.0, headers=headers)
        self.start_seconds = 0.0

    def __enter__(self) -> Server:
        started = time.monotonic()
        with self.log.open("w") as log:
            # A group of its own, to be stopped as a whole, but this session: Linux shares the cores between sessions
            # first, and the polling of bound workers then starves a client in another session for seconds.
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, process_group=0
            )
        while time.monotonic() - started < START_LIMIT_S:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}:\n{self.log_tail()}")
            try:
                if self.client.get("/health", timeout=2.0).status_code == 200:
                    self.start_seconds = time.monotonic() - started
                    return self
            except httpx.TransportError:
                time.sleep(0.25)
        self._kill()
        raise RuntimeError(f"the server was not up after {START_LIMIT_S:g} s:\n{self.log_tail()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._process.terminate()
        deadline = time.monotonic() + STOP_LIMIT_S
        while time.monotonic() < deadline:
            self._process.poll()
            if not _group_alive(self._process.pid):
                return
            time.sleep(0.1)
        self._kill()
        if kind is None:
            raise RuntimeError(f"the server's processes were not gone {STOP_LIMIT_S:g} s after SIGTERM")

    @property
    def pid(self) -> int:
        """The server's first process, which leads the process group of all."""
        return self._process.pid

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def log_tail(self, lines: int = 60) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # ---- the plugin's routes --------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """GET /plugins/flying/status."""
        response = self.client.get("/plugins/flying/status")
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    def switch(self, groups: list[list[int]], **options: Any) -> dict[str, Any]:
        """POST /plugins/flying/switch, which must succeed."""
        response = self.try_switch(groups, **options)
        assert response.status_code == 200, response.text
        record: dict[str, Any] = response.json()
        return record

    def try_switch(self, groups: list[list[int]], **options: Any) -> httpx.Response:
        """POST /plugins/flying/switch."""
        return self.client.post("/plugins/flying/switch", json={"groups": groups, **options})

    def scheduled_tokens(self) -> int:
        """Tokens that all engines computed since start, in all layouts."""
        return sum(engine["scheduled_tokens"] for engine in self.status()["engines"])

    # ---- generation -----------------------------------------------------------------------------------------------

    def complete(self, prompt: list[int] | str, max_tokens: int = 16, **options: Any) -> httpx.Response:
        """POST /v1/completions; greedy, to the end, with token ids, unless `options` say otherwise."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **options,
        }  # fmt: skip
        headers = body.pop("headers", None)
        return self.client.post("/v1/completions", json=body, headers=headers)

    def tokens(self, prompt: list[int] | str, max_tokens: int = 16, **options: Any) -> list[int]:
        """Token ids of a completion."""
        response = self.complete(prompt, max_tokens, **options)
        assert response.status_code == 200, response.text
        ids: list[int] = response.json()["choices"][0]["token_ids"]
        return ids

    def nll(self, prompt: list[int], **options: Any) -> list[float]:
        """Teacher-forced negative log-likelihood of every prompt token after the first."""
        response = self.complete(prompt, 1, prompt_logprobs=0, **options)
        assert response.status_code == 200, response.text
        entries = response.json()["choices"][0]["prompt_logprobs"]
        return [-entries[i][str(prompt[i])]["logprob"] for i in range(1, len(prompt))]


def _environment(workers: int) -> dict[str, str]:
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(worker % 2) for worker in range(workers)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
