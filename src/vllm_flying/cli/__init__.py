"""The command `vllm-flying`: serve, status, switch, explain, doctor."""

from __future__ import annotations


def main() -> int:
    """Console entry point."""
    from vllm_flying.cli.main import run

    return run()
