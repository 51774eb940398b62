"""The manifest is complete, true of the installed vLLM, and its ledger is up to date."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import vllm_flying
from vllm_flying.seams.ledger import ledger
from vllm_flying.seams.manifest import PATCHED, REPLACED, USED, Symbol, all_symbols
from vllm_flying.seams.runtime_check import vllm_package
from vllm_flying.seams.source_check import check_source

REPOSITORY = Path(__file__).parents[2]
PACKAGE = Path(vllm_flying.__file__).parent


def test_the_installed_vllm_is_as_the_manifest_says() -> None:
    assert check_source(vllm_package(), all_symbols()) == []


def test_every_import_of_vllm_is_in_the_manifest() -> None:
    listed = {(symbol.module, symbol.name.split(".")[0]) for symbol in all_symbols()}
    missing = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                missing += [
                    f"{file.relative_to(PACKAGE)}: {node.module}.{alias.name}"
                    for alias in node.names
                    if (node.module, alias.name) not in listed
                ]
    assert missing == []


def test_a_missing_symbol_and_a_missing_parameter_are_found(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text("class Owner:\n    def method(self, old): ...\nvalue = 1\n")
    good = [Symbol("vllm.part", "value", "x"), Symbol("vllm.part", "Owner.method", "x", ("self", "old"))]
    assert check_source(tmp_path, good) == []
    bad = [
        Symbol("vllm.part", "gone", "x"),
        Symbol("vllm.part", "Owner.gone", "x"),
        Symbol("vllm.part", "Owner.method", "x", ("new",)),
        Symbol("vllm.absent", "value", "x"),
    ]
    assert [mismatch.symbol for mismatch in check_source(tmp_path, bad)] == bad


def test_the_ledger_is_up_to_date() -> None:
    written = (REPOSITORY / "docs" / "patches.md").read_text()
    assert written == ledger(), "run: python -m vllm_flying.seams ledger --write"


def test_no_symbol_is_listed_twice_and_tests_exist() -> None:
    names = [(symbol.module, symbol.name) for symbol in all_symbols()]
    assert sorted(names) == sorted(set(names))
    assert USED
    for test in [entry.test for entry in (*PATCHED, *REPLACED)]:
        assert (REPOSITORY / test).is_file(), test
    for replaced in REPLACED:
        assert {(replaced.module, name) for name in replaced.names.split(", ")} <= set(names), replaced.names


# Members of listed classes by name, which the package names on objects of its own, of Python or of torch.
NAMED_ELSEWHERE = {
    "add_argument", "append", "barrier", "config", "ctx", "encode", "gather", "generation_config", "inference_mode", "kwargs",
    "parse_args", "popleft", "set", "shape", "stop", "timeout",
}  # fmt: skip


def test_every_member_of_a_listed_class_that_is_named_is_in_the_manifest() -> None:
    """A member that vLLM drops must not go unnoticed.

    By name alone, since objects of vLLM carry no types here: names that the package defines too are not looked at.
    """
    listed = {part for symbol in all_symbols() for part in symbol.name.split(".")}
    members = set().union(*(members_of(symbol) for symbol in all_symbols()))
    named, own = names_in_package()
    assert sorted((named & members) - listed - own - NAMED_ELSEWHERE) == []
    assert {"num_computed_tokens", "kv_cache_manager"} <= named & members, "nothing was looked at"


def members_of(symbol: Symbol) -> set[str]:
    """What the class of a symbol defines or sets on itself."""
    file = vllm_package().joinpath(*symbol.module.split(".")[1:])
    file = file.with_suffix(".py") if file.with_suffix(".py").is_file() else file / "__init__.py"
    owner = symbol.name.split(".")[0]
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            return set().union(*(names_set_by(inner) for inner in ast.walk(node)))
    return set()


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def names_set_by(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
        return {node.attr}
    return set()


def names_in_package() -> tuple[set[str], set[str]]:
    """Attributes that the package names, and those that it defines."""
    named, own = set[str](), set[str]()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(parsed(file)):
            own |= names_set_by(node)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                named.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                name = node.args[1]
                named |= {name.value} if isinstance(name, ast.Constant) and isinstance(name.value, str) else set()
    return named, own
