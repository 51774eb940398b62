"""The manifest is complete, true of the installed vLLM, and its ledger is up to date."""

from __future__ import annotations

import ast
from pathlib import Path

import vllm_flying
from vllm_flying.seams.ledger import ledger
from vllm_flying.seams.manifest import PATCHED, USED, Symbol, all_symbols
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
    for patched in PATCHED:
        assert (REPOSITORY / patched.test).is_file(), patched.test
