"""Page numbers in a step are translated everywhere, and a page that isn't backed is never papered over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_flying.core.leases import as_pages
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
    pages.add(as_pages([1, 2, 3]), as_pages([7, 9, 4]))
    translated = pages.translate(step([[1, 3], [0]], [None, [2]], [3]))
    assert [request.block_ids for request in translated.scheduled_new_reqs] == [([7, 4],), ([0],)]
    assert translated.scheduled_cached_reqs.new_block_ids == [None, ([9],)]
    assert translated.new_block_ids_to_zero == [4]
    assert len(pages) == 3


def test_a_group_that_forms_again_backs_what_it_is_told_and_no_more() -> None:
    pages = PageMap()
    pages.add(as_pages([1, 2, 3, 4]), as_pages([7, 9, 4, 5]))
    pages.back_only(as_pages([2, 3]), as_pages([8, 9]))
    assert len(pages) == 2
    assert pages.physical([0, 2, 3]) == [0, 8, 9]
    for page in (1, 4):
        with pytest.raises(KeyError, match=str(page)):
            pages.physical([page])


def test_a_page_that_is_not_backed_is_an_error() -> None:
    pages = PageMap()
    pages.add(as_pages([1, 2]), as_pages([7, 9]))
    pages.remove(as_pages([1]))
    for page in (1, 3):
        with pytest.raises(KeyError, match=str(page)):
            pages.translate(step([[2, page]], []))
