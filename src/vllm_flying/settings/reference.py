"""docs/settings.md, made from the docstrings of the settings' fields.

Pure: no torch, no vllm. `python -m vllm_flying.settings.reference` prints it.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields

from vllm_flying.settings.settings import Settings

INTRODUCTION = """# Settings

Given under vLLM's `--additional-config`, all optional; an unknown key or a bad value refuses to start:

    vllm-flying serve MODEL --data-parallel-size 4 --additional-config '{"flying": {"widths": [2, 4]}}'

| setting | default | meaning |
|---|---|---|
"""
PRODUCED_BY = "\nMade from `src/vllm_flying/settings/settings.py` by `python -m vllm_flying.settings.reference`.\n"


def field_docstrings() -> dict[str, str]:
    """Field name -> the string literal below it."""
    (settings_class,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(settings_class, ast.ClassDef)
    documented = {}
    for statement, following in zip(settings_class.body, settings_class.body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                documented[statement.target.id] = " ".join(text.value.split())
    return documented


def reference() -> str:
    """Text of docs/settings.md."""
    documented = field_docstrings()
    rows = [f"| `{field.name}` | `{_shown(field.default)}` | {documented[field.name]} |" for field in fields(Settings)]
    return INTRODUCTION + "\n".join(rows) + "\n" + PRODUCED_BY


def _shown(default: object) -> str:
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    print(reference(), end="")
