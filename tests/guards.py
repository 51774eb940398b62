"""`python -m tests.guards`: take each guard against a known trap out of a copy of the package, and see its test fail.

Not part of `make test`: it runs engine tests on broken code, one start-up each. docs/traps.md says what the traps are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_S = 400.0


@dataclass(frozen=True)
class Guard:
    """`text` in `file` keeps a trap shut; with `broken` in its place, `test` must fail."""

    trap: int
    file: str
    text: str
    broken: str
    test: str


GUARDS = (
    Guard(
        6, "worker/extension.py",
        "layout.runner.initialize_kv_cache(wide, ", "layout.runner.initialize_kv_cache(kv_cache_config, ",
        "tests/engine/test_families.py -k qwen3",
    ),
    Guard(
        6, "worker/extension.py",
        "super().execute_model(layout.pages.translate(payload))", "super().execute_model(payload)",
        "tests/engine/test_migration.py -k computed_twice",
    ),
    Guard(
        8, "scheduler/agent.py",
        "        physical = self.leases.take_back(width, returned)\n",
        "        returned = returned[: len(returned) // 2]\n        physical = self.leases.take_back(width, returned)\n",
        "tests/engine/test_migration.py -k computed_twice",
    ),
    Guard(
        8, "scheduler/departures.py",
        "        scheduler.kv_cache_manager.free(request)\n", "",
        "tests/engine/test_migration.py -k computed_twice",
    ),
    Guard(
        9, "scheduler/page_pool.py",
        "self._evict((self._away | self._doubtful) - kept)", "pass",
        "tests/scheduler/test_prefixes.py",
    ),
    Guard(
        9, "scheduler/agent.py",
        "confirm(physical[~np.isin(returned, written)])", "confirm(physical)",
        "tests/engine/test_migration.py -k outlive",
    ),
    Guard(
        10, "scheduler/handover.py",
        "    travelling.structured_output_request = None\n",
        "    travelling.structured_output_request = None\n"
        "    travelling.prompt_token_ids = list(request.all_token_ids)\n"
        "    travelling.num_prompt_tokens = request.num_tokens\n"
        "    travelling._output_token_ids = []\n",
        "tests/engine/test_migration.py -k computed_twice",
    ),
    Guard(
        13, "frontend/switcher.py",
        "            self._fetching = self._later(self._fetch_paused())\n", "            pass\n",
        "tests/engine/test_migration.py -k without_room",
    ),
)  # fmt: skip


def fails_without(guard: Guard) -> bool:
    """Whether the guard's test fails once the guard is gone."""
    with tempfile.TemporaryDirectory(prefix="vllm-flying-guards-") as scratch:
        copy = Path(scratch)
        for name in ("src", "tests", "pyproject.toml"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        file = copy / "src" / "vllm_flying" / guard.file
        text = file.read_text()
        if text.count(guard.text) != 1:
            raise SystemExit(f"{guard.file} has {text.count(guard.text)} times {guard.text!r}; mend tests/guards.py")
        file.write_text(text.replace(guard.text, guard.broken))
        paths = {"PYTHONPATH": f"{copy / 'src'}:{copy}"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "300", *guard.test.split()]
        log = copy / "log"
        with log.open("w") as output:
            try:
                code = subprocess.run(
                    command, cwd=copy, env={**os.environ, **paths}, stdout=output, stderr=output, timeout=LIMIT_S
                ).returncode
            except subprocess.TimeoutExpired:
                code = 1
        if code not in (0, 1):
            raise SystemExit(f"pytest ended with {code}:\n{log.read_text()[-2000:]}")
        return code == 1


def main() -> None:
    """Try all guards, or those of the traps that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traps", type=int, nargs="*", help="numbers of traps; all by default")
    wanted = parser.parse_args().traps
    passed = []
    for guard in GUARDS:
        if wanted and guard.trap not in wanted:
            continue
        fails = fails_without(guard)
        print(f"trap {guard.trap:2}  {'fails' if fails else 'PASSES'} without {guard.file}: {guard.test}", flush=True)
        if not fails:
            passed.append(guard)
    sys.exit(1 if passed else 0)


if __name__ == "__main__":
    main()
