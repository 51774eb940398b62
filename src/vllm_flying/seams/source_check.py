"""Check the manifest against a vLLM source tree, by reading it: nothing is imported or run.

Pure: no torch, no vllm.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from vllm_flying.seams.manifest import Symbol


@dataclass(frozen=True)
class Mismatch:
    """A symbol that isn't as the manifest says."""

    symbol: Symbol
    problem: str

    def __str__(self) -> str:
        return f"{self.symbol.module}:{self.symbol.name} ({self.symbol.used_for}): {self.problem}"


def check_source(package: Path, symbols: Iterable[Symbol]) -> list[Mismatch]:
    """Mismatches between `symbols` and the vLLM package directory `package`."""
    problems = ((symbol, _problem_anywhere(package, symbol)) for symbol in symbols)
    return [Mismatch(symbol, problem) for symbol, problem in problems if problem]


def _problem_anywhere(package: Path, symbol: Symbol) -> str | None:
    problem = _problem(package, symbol)
    if problem and symbol.moved_to and _problem(package, replace(symbol, module=symbol.moved_to)) is None:
        return None
    return problem


def _problem(package: Path, symbol: Symbol) -> str | None:
    tree = _parse(package, symbol.module)
    if tree is None:
        return f"module {symbol.module} does not exist"
    owner_name, _, member = symbol.name.partition(".")
    found = _top_level(tree, owner_name)
    if found is None and not _is_module(package, f"{symbol.module}.{owner_name}"):
        return "not found"
    if member:
        if not isinstance(found, ast.ClassDef):
            return f"{owner_name} is not a class defined in {symbol.module}"
        found = _member(found, member)
        if found is None:
            return "not found in its class"
    missing = sorted(set(symbol.parameters) - set(_parameters(found))) if symbol.parameters else []
    return f"parameters {missing} are gone; it has {sorted(_parameters(found))}" if missing else None


@lru_cache(maxsize=256)
def _parse(package: Path, module: str) -> ast.Module | None:
    base = package.joinpath(*module.split(".")[1:])
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


def _is_module(package: Path, module: str) -> bool:
    return _parse(package, module) is not None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, also those under `if` and `try`."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                yield from _statements(getattr(statement, field, []))


def _names(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.Assign):
        yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
        yield from (
            item.id
            for target in statement.targets
            if isinstance(target, ast.Tuple)
            for item in target.elts
            if isinstance(item, ast.Name)
        )
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id


def _top_level(tree: ast.Module, name: str) -> ast.AST | None:
    found = [statement for statement in _statements(tree.body) if name in _names(statement)]
    if found:
        return next((s for s in found if isinstance(s, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)), found[0])
    # Packages that import on first use name what they offer in a table of strings.
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return tree if name in strings else None


def _member(owner: ast.ClassDef, name: str) -> ast.AST | None:
    for statement in _statements(owner.body):
        if name in _names(statement):
            return statement
    for node in ast.walk(owner):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name:
            return node
    return None


def _parameters(found: ast.AST | None) -> list[str]:
    if isinstance(found, ast.ClassDef):
        found = _member(found, "__init__")
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    arguments = found.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
