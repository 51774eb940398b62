"""`python -m vllm_flying.seams check [--source DIR]` and `... ledger [--write]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_flying.seams.ledger import ledger
from vllm_flying.seams.manifest import all_symbols
from vllm_flying.seams.runtime_check import SeamMismatchError, check_installed
from vllm_flying.seams.source_check import check_source


def main() -> int:
    """Exit status 1 for a mismatch."""
    parser = argparse.ArgumentParser(prog="python -m vllm_flying.seams")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check the manifest against vLLM's source")
    check.add_argument("--source", type=Path, help="a vLLM package directory (default: the installed one)")
    commands.add_parser("ledger", help="print docs/patches.md").add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "ledger":
        if arguments.write:
            Path("docs/patches.md").write_text(ledger())
        else:
            print(ledger(), end="")
        return 0
    if arguments.source is None:
        try:
            print(f"all {check_installed()} symbols are as expected")
        except SeamMismatchError as error:
            print(error)
            return 1
        return 0
    mismatches = check_source(arguments.source, all_symbols())
    print("\n".join(map(str, mismatches)) or f"all {len(all_symbols())} symbols are as expected")
    return 1 if mismatches else 0


if __name__ == "__main__":
    raise SystemExit(main())
