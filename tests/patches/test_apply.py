"""Wraps are applied together or not at all, and once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_flying.patches.apply import Patch, applied_patches, apply_patches


def test_all_or_nothing_and_once() -> None:
    class Owner:
        @staticmethod
        def first() -> int:
            return 1

    def add_one(original):  # type: ignore[no-untyped-def]
        return lambda: original() + 1

    good, bad = Patch(Owner, "first", add_one), Patch(Owner, "absent", add_one)
    with pytest.raises(AttributeError):
        apply_patches([good, bad])
    assert Owner.first() == 1
    apply_patches([good])
    apply_patches([good])
    assert Owner.first() == 2
    assert good.symbol in applied_patches()


def test_symbols_are_named_as_in_the_manifest() -> None:
    module = SimpleNamespace(__name__="vllm.some.module", function=len)
    assert Patch(module, "function", lambda original: original).symbol == "vllm.some.module.function"
