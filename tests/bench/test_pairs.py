"""Every pair of layouts is switched, and one follows on the other where it can."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest

from bench.switch import every_pair, uniform_layouts


def test_uniform_layouts() -> None:
    assert uniform_layouts(4) == [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]]]


@pytest.mark.parametrize("engines", [2, 4, 8])
def test_every_pair_once(engines: int) -> None:
    layouts = uniform_layouts(engines)
    pairs = every_pair(layouts)
    assert len(pairs) == len(layouts) * (len(layouts) - 1)
    assert all(pair in pairs for pair in permutations(layouts, 2))
    assert sum(a[1] != b[0] for a, b in pairwise(pairs)) < len(layouts)
