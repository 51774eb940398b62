"""Command line: dispatches to serve, status, switch, explain and doctor.

Imports neither torch nor vllm; `serve` and `doctor` do when they run.
"""

from __future__ import annotations

import argparse
import sys

from vllm_flying import __version__
from vllm_flying.cli import doctor, remote


def run(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["serve"]:  # its arguments are vLLM's
        from vllm_flying.cli.serve import serve

        return serve(given[1:])
    parser = argparse.ArgumentParser(
        prog="vllm-flying", description="Change the parallel layout of a running vLLM server."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="start a server: vLLM's own `serve`, with the plugin enabled; same arguments")
    remote.add_parsers(commands)
    doctor.add_parser(commands)
    parsed = parser.parse_args(given)
    result: int = parsed.run(parsed)
    return result


if __name__ == "__main__":
    raise SystemExit(run())
