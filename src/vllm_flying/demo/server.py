"""The demo's server: two engines on CPU, in processes that end with the demo.

Standard library and httpx.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx

START_LIMIT_S = 300.0
STOP_LIMIT_S = 30.0
ADVICE = "Run `vllm-flying doctor` to see what is missing."


class ServerStartError(RuntimeError):
    """The server did not come up; the text holds the end of its log and what to do."""

    def __init__(self, what: str, log_tail: str) -> None:
        super().__init__(f"{what}. The last lines of its log:\n{log_tail}\n{ADVICE}")


class DemoServer:
    """`vllm-flying serve` on a free port, logging to a file."""

    def __init__(self, model: Path, log: Path, engines: int = 2) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.model = str(model)
        self._log = log
        self._command = [
            sys.executable, "-m", "vllm_flying.cli.main", "serve", str(model), "--data-parallel-size", str(engines),
            "--api-server-count", "1", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048",
            "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20),
            "--additional-config", json.dumps({"flying": {"policy": "manual"}}),  # the demo switches by itself
        ]  # fmt: skip
        cores = sorted(os.sched_getaffinity(0))
        binding = "|".join(str(cores[engine % len(cores)]) for engine in range(engines))
        self._environment = {
            **os.environ, "VLLM_CPU_OMP_THREADS_BIND": binding, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip

    def __enter__(self) -> DemoServer:
        started = time.monotonic()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, process_group=0
            )
        try:
            self._wait_until_ready(started)
        except BaseException:  # Ctrl-C too: __exit__ is not called for a failed __enter__
            self._stop()
            raise
        return self

    def _wait_until_ready(self, started: float) -> None:
        next_line = 0.0
        while (waited := time.monotonic() - started) < START_LIMIT_S:
            if self._process.poll() is not None:
                raise ServerStartError(f"the server ended with status {self._process.returncode}", self._tail())
            # trust_env: a proxy of the environment doesn't know this machine's 127.0.0.1
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=2.0, trust_env=False).status_code == 200:
                    print(f"{self._line_start()}Server ready after {waited:.0f} s.{' ' * 20}", flush=True)
                    return
            if sys.stdout.isatty():
                print(f"\rStarting the server ... {waited:.0f} s", end="", flush=True)
            elif waited >= next_line:
                print(f"Starting the server ... {waited:.0f} s (limit {START_LIMIT_S:.0f} s)", flush=True)
                next_line = waited + 10.0
            time.sleep(1.0)
        raise ServerStartError(f"the server was not ready after {START_LIMIT_S:.0f} s", self._tail())

    @staticmethod
    def _line_start() -> str:
        return "\r" if sys.stdout.isatty() else ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _tail(self, lines: int = 40) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
