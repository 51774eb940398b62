"""Tiles cover a weight exactly once, in every degree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flying.core.tiles import TileError, TilePlan, check_divides, tiles_of_rank


@st.composite
def plans(draw: st.DrawFn) -> TilePlan:
    num_tiles = draw(st.sampled_from([1, 2, 4, 8]))
    parts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    return TilePlan(tuple(part * num_tiles for part in parts), num_tiles)


def rows(ranges: list[tuple[int, int]]) -> list[int]:
    return [row for start, stop in ranges for row in range(start, stop)]


@given(plans())
def test_tiles_partition_the_weight(plan: TilePlan) -> None:
    everything = [row for tile in range(plan.num_tiles) for row in rows(plan.tile_ranges(tile))]
    assert sorted(everything) == list(range(sum(plan.part_sizes)))


@given(plans(), st.data())
def test_a_shard_is_its_tiles_in_part_order(plan: TilePlan, data: st.DataObject) -> None:
    ratio = data.draw(st.sampled_from([r for r in (1, 2, 4, 8) if plan.num_tiles % r == 0]))
    position = data.draw(st.integers(0, ratio - 1))
    tiles = tiles_of_rank(plan.num_tiles, ratio, position)
    output: list[int | None] = [None] * (plan.tile_size * len(tiles))
    for tile, moves in zip(tiles, plan.output_slices(tiles), strict=True):
        produced = rows(plan.tile_ranges(tile))
        for (start, stop), (to_start, to_stop) in moves:
            assert all(value is None for value in output[to_start:to_stop])
            output[to_start:to_stop] = produced[start:stop]
    assert output == rows(plan.shard_ranges(tiles))


@given(plans(), st.data())
def test_ranks_share_the_tiles_out(plan: TilePlan, data: st.DataObject) -> None:
    ratio = data.draw(st.sampled_from([r for r in (1, 2, 4, 8) if plan.num_tiles % r == 0]))
    dealt = [tile for position in range(ratio) for tile in tiles_of_rank(plan.num_tiles, ratio, position)]
    assert dealt == list(range(plan.num_tiles))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(TileError, match="6 rows can't be cut into 4"):
        TilePlan((8, 6), 4)
    with pytest.raises(TileError):
        tiles_of_rank(4, 3, 0)
    assert check_divides([("KV heads", 3), ("heads", 8)], 2) == [
        "KV heads = 3 is not a multiple of the tensor-parallel degree 2"
    ]
