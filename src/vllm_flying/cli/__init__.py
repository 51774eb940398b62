"""The command `vllm-flying`: serve, status, switch, explain, doctor.

A process that vLLM spawns first imports its parent's main module, and with it this package, before it imports vLLM. So
it is where the parent is the command or `python -m vllm_flying.cli.main`; Python leaves out a package's `__main__`.
"""

from __future__ import annotations

from vllm_flying.cli.imports import put_full_collections_off

put_full_collections_off()


def main() -> int:
    """Console entry point."""
    from vllm_flying.cli.main import run

    return run()
