"""docs/patches.md, made from the manifest.

Pure: no torch, no vllm.
"""

from __future__ import annotations

from vllm_flying.seams.manifest import PATCHED, REPLACED, SUPPORTED, USED

INTRODUCTION = """# What of vLLM this plugin touches

Made from `src/vllm_flying/seams/manifest.py` by `python -m vllm_flying.seams ledger --write`. At start every symbol is
looked up in the installed vLLM's source with the parameters relied on; a mismatch, or a vLLM outside >= {first}, < {end},
refuses to start. The same check runs over an unpacked source tree: `python -m vllm_flying.seams check --source DIR`.

## Wrapped functions

All of a process's wraps are applied together or not at all; each calls vLLM's own function.

| function | why no seam serves | guard | shown by |
|---|---|---|---|
"""


def ledger() -> str:
    """Text of docs/patches.md."""
    first, end = (".".join(map(str, bound)) for bound in SUPPORTED)
    lines = [INTRODUCTION.format(first=first, end=end).rstrip("\n")]
    for patched in PATCHED:
        name = f"`{patched.symbol.module}.{patched.symbol.name}`"
        lines.append(f"| {name} | {patched.reason} | {patched.guard} | `{patched.test}` |")
    lines += ["", "## Values that are set", "", "| what | when and why | where and guard | shown by |", "|---|---|---|---|"]
    for replaced in REPLACED:
        lines.append(f"| `{replaced.module}`: `{replaced.names}` | {replaced.reason} | {replaced.guard} | `{replaced.test}` |")
    lines += ["", "## Used as they are", "", "| module | symbols | for |", "|---|---|---|"]
    rows: dict[tuple[str, str], list[str]] = {}
    for symbol in USED:
        rows.setdefault((symbol.module, symbol.used_for), []).append(symbol.name)
    for (module, used_for), names in sorted(rows.items()):
        lines.append(f"| `{module}` | {', '.join(f'`{name}`' for name in names)} | {used_for} |")
    return "\n".join(lines) + "\n"
