"""Tiles compute what the whole weight does, in either packing: neighbours joined, parts in their order, biases, columns."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from vllm.platforms import current_platform

from vllm_flying.core.tiles import TilePlan
from vllm_flying.loader.blocked import MOST_COLUMNS, BlockedTile, suits
from vllm_flying.loader.cutting import row_tiles
from vllm_flying.loader.methods import TiledColumnsMethod, TiledRowsMethod
from vllm_flying.loader.resident import CutLayer
from vllm_flying.loader.tile import StockTile, Tile

NOTHING = torch.nn.Module()
COLUMNS = 128


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    current_platform.import_kernels()
    torch.manual_seed(0)


def random(*size: int) -> torch.Tensor:
    return torch.randn(*size).to(torch.bfloat16)


def packed(packing: str, weight: torch.Tensor, bias: torch.Tensor | None, plan: TilePlan) -> tuple[Tile, ...]:
    ranges = [plan.tile_ranges(tile) for tile in range(plan.num_tiles)]
    if packing == "blocks" and not suits(weight, chain.from_iterable(ranges)):
        pytest.skip("this CPU has no AVX512-BF16, or it has AMX")
    tiles = row_tiles(weight, bias, ranges, blocked=packing == "blocks")
    assert all(isinstance(tile, BlockedTile if packing == "blocks" else StockTile) for tile in tiles)
    return tuple(tiles)


@pytest.mark.parametrize("packing", ["stock", "blocks"])
@pytest.mark.parametrize("parts", [(512,), (256, 128, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows(packing: str, parts: tuple[int, ...], with_bias: bool) -> None:
    plan, weight, bias = TilePlan(parts, 4), random(sum(parts), COLUMNS), random(sum(parts))
    cut = CutLayer(plan, packed(packing, weight, bias if with_bias else None, plan), by_rows=True)
    for tiles in (range(0, 4), range(0, 2), range(2, 4), range(3, 4)):
        shard = torch.cat([torch.arange(*each) for each in plan.shard_ranges(tiles)])
        for x in (random(1, COLUMNS), random(7, COLUMNS), random(40, COLUMNS)):
            expected = torch.nn.functional.linear(x.float(), weight[shard].float(), bias[shard].float() if with_bias else None)
            for dtype in (None, torch.float32):
                output = TiledRowsMethod(cut, tiles, dtype).apply(NOTHING, x, bias if with_bias else None)
                torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("packing", ["stock", "blocks"])
def test_columns(packing: str) -> None:
    plan, weight = TilePlan((COLUMNS,), 2), random(96, COLUMNS)
    columns = [weight[:, start:stop] for tile in range(2) for start, stop in plan.tile_ranges(tile)]
    cut = CutLayer(plan, tuple(packed(packing, each, None, TilePlan((96,), 1))[0] for each in columns), by_rows=False)
    bias = random(96)
    for x in (random(1, COLUMNS), random(9, COLUMNS)):
        expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
        output = TiledColumnsMethod(cut, range(2)).apply(NOTHING, x, bias)
        torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.2)
        second = TiledColumnsMethod(cut, range(1, 2)).apply(NOTHING, x[:, 64:])
        torch.testing.assert_close(second.float(), x[:, 64:].float() @ weight[:, 64:].float().T, rtol=0.02, atol=0.2)


def test_blocks_are_one_copy_and_neighbours_one_tile() -> None:
    weight, plan = random(256, COLUMNS), TilePlan((256,), 4)
    tiles = packed("blocks", weight, None, plan)
    cut = CutLayer(plan, tiles, by_rows=True)
    (two,) = cut.joined(range(1, 3))
    assert isinstance(two, BlockedTile) and two.num_bytes == 2 * tiles[0].num_bytes == 2 * 64 * COLUMNS * 2
    assert tiles[0].joined([tiles[2]]) is None, "not neighbours"
    assert len(cut.joined(range(4))) == 1
    stock = CutLayer(plan, packed("stock", weight, None, plan), by_rows=True)
    assert len(stock.joined(range(4))) == 4 and len(stock.joined(range(1, 2))) == 1


@pytest.mark.parametrize(("tiles", "multiplications"), [(range(4), 1), (range(2), 3), (range(1, 2), 3)])
def test_blocks_of_a_fused_weight_are_multiplied_part_by_part(tiles: range, multiplications: int) -> None:
    plan = TilePlan((256, 128, 128), 4)
    cut = CutLayer(plan, packed("blocks", random(512, COLUMNS), None, plan), by_rows=True)
    method, x = TiledRowsMethod(cut, tiles), random(3, COLUMNS)
    with torch.profiler.profile() as profile:
        method.apply(NOTHING, x)
    called = [event.name for event in profile.events()]
    assert called.count("_C::weight_packed_linear") == multiplications
    assert not {"aten::cat", "aten::copy_", "aten::contiguous"} & set(called), "outputs are written in place"


def test_what_blocks_are_not_for() -> None:
    whole = [(0, 64)]
    assert not suits(torch.empty(64, 128, dtype=torch.float32), whole)
    assert not suits(torch.empty(96, 128, dtype=torch.bfloat16), [(0, 48), (48, 96)]), "half a block"
    assert not suits(torch.empty(64, 2 * MOST_COLUMNS, dtype=torch.bfloat16), whole), "too many columns"
    assert not suits(torch.empty(32768, 512, dtype=torch.bfloat16), [(0, 16384)]), "an output head of few columns"
