"""Page numbers in a step are translated everywhere, and a page that isn't backed is never papered over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_flying.worker.pages import PageMap


def step(new: list[list[int]], cached: list[list[int] | None], zero: list[int] | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=(pages,)) for pages in new],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[None if p is None else (p,) for p in cached]),
        new_block_ids_to_zero=zero,
        kv_cache_block_copies=None,
    )


def test_every_page_is_translated() -> None:
    pages = PageMap()
    pages.add({1: 7, 2: 9, 3: 4})
    translated = pages.translate(step([[1, 3], [0]], [None, [2]], [3]))
    assert [request.block_ids for request in translated.scheduled_new_reqs] == [([7, 4],), ([0],)]
    assert translated.scheduled_cached_reqs.new_block_ids == [None, ([9],)]
    assert translated.new_block_ids_to_zero == [4]
    assert len(pages) == 3


def test_a_page_that_is_not_backed_is_an_error() -> None:
    pages = PageMap()
    pages.add({1: 7})
    pages.remove([1])
    with pytest.raises(KeyError):
        pages.translate(step([[1]], []))
