"""Tiles in vLLM's other packing for CPU: blocks of output rows, one after the other, so that a tile is slices of them.

May import torch and vllm. vLLM packs most weights for oneDNN, in a form that only oneDNN can read, and some for kernels of
its own, where block follows block: a range of rows is a slice of that, and the kernels write where they are told. The
whole weight is then one multiplication, and a share of a fused one (query/key/value, gate/up) one per part, with nothing
to be put together afterwards. Which packing is quicker depends on the CPU: up to four rows of input these kernels take a tenth
to two fifths less time than oneDNN without AMX, from sixteen on as much on one CPU and a tenth to a fifth more on a newer one.
So they are the operator's choice (`packing`); `docs/benchmarks.md` has the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
from vllm._custom_ops import weight_packed_linear_cpu
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_flying.core.tiles import Range
from vllm_flying.loader.tile import Tile

# Output rows per block, and what the kernels want of the columns.
BLOCK = 32
# Columns above which the kernels fall behind from five rows on: they hold a block's columns in the cache at once.
MOST_COLUMNS = 4096
# Below so many columns they fall behind for very tall weights, such as output heads.
FEW_COLUMNS, MOST_ROWS_OF_FEW = 2048, 16384


def suits(weight: torch.Tensor, ranges: Iterable[Range]) -> bool:
    """Whether these kernels are the quicker ones for a weight `[rows, columns]` of which tiles are these row ranges."""
    rows, columns = weight.shape
    if not current_platform.is_cpu() or weight.dtype != torch.bfloat16:
        return False
    # With AMX vLLM's own choice stands: it is by size there.
    if not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return False
    if not hasattr(torch.ops._C, "weight_packed_linear") or columns % BLOCK:
        return False
    if any(start % BLOCK or stop % BLOCK for start, stop in ranges):
        return False
    tall = rows > MOST_ROWS_OF_FEW
    return columns <= MOST_COLUMNS and not (tall and columns < FEW_COLUMNS)


def _part_by_part(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    output = _nothing_yet(x, weights, biases)
    parts = output.split([weight.shape[0] for weight in weights], dim=-1)
    for part, weight, bias in zip_longest(parts, weights, biases):
        torch.ops._C.weight_packed_linear(part, x, weight, bias, True)
    return output


def _nothing_yet(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


# One op to torch.compile: vLLM compiles without `enable_auto_functionalized_v2`, and slices of an output that are written to
# then become copies of it, of a wrong size even.
_LIBRARY = torch.library.Library("vllm_flying", "FRAGMENT")
direct_register_custom_op("part_by_part", _part_by_part, fake_impl=_nothing_yet, target_lib=_LIBRARY, dispatch_key="CPU")


class BlockedTile(Tile):
    """Some row ranges, one after the other, of a packed weight `[all rows, columns]`."""

    def __init__(self, packed: torch.Tensor, bias: torch.Tensor | None, ranges: Sequence[Range]) -> None:
        super().__init__()
        self._packed, self._bias, self._ranges = packed, bias, _without_seams(ranges)
        self._weights = [packed[start:stop] for start, stop in self._ranges]
        self._biases = [] if bias is None else [bias[start:stop] for start, stop in self._ranges]
        self._size = sum(stop - start for start, stop in ranges)
        self.num_bytes = self._size * packed.shape[1] * packed.element_size()

    def forward(self, x: torch.Tensor, with_bias: bool) -> torch.Tensor:
        """`x` is `[..., columns]`; returns `[..., rows]`."""
        biases = self._biases if with_bias else []
        if len(self._weights) == 1:
            return weight_packed_linear_cpu(x, self._weights[0], self._size, biases[0] if biases else None)
        output = torch.ops.vllm_flying.part_by_part(x.reshape(-1, x.shape[-1]), self._weights, biases)
        return output.view(*x.shape[:-1], self._size)

    def joined(self, neighbours: Sequence[Tile]) -> Tile | None:
        """This tile and those whose ranges follow its own, of the same weight."""
        ranges = self._ranges
        for tile in neighbours:
            if not isinstance(tile, BlockedTile) or tile._packed is not self._packed or len(tile._ranges) != len(ranges):
                return None
            if any(mine[1] != other[0] for mine, other in zip(ranges, tile._ranges)):
                return None
            ranges = [(mine[0], other[1]) for mine, other in zip(ranges, tile._ranges)]
        return BlockedTile(self._packed, self._bias, ranges)


def _without_seams(ranges: Sequence[Range]) -> list[Range]:
    """The same rows in fewer ranges, where one goes on where another ends."""
    whole = [ranges[0]]
    for start, stop in ranges[1:]:
        if start == whole[-1][1]:
            whole[-1] = (whole[-1][0], stop)
        else:
            whole.append((start, stop))
    return whole


def blocked_tiles(weight: torch.Tensor, bias: torch.Tensor | None, tiles: Iterable[Sequence[Range]]) -> list[BlockedTile]:
    """Tiles of a weight `[rows, columns]`, given by their row ranges: one packed copy of all."""
    packed: torch.Tensor = torch.ops._C.convert_weight_packed(weight.contiguous())
    bias = None if bias is None else bias.to(torch.float32)
    return [BlockedTile(packed, bias, ranges) for ranges in tiles]
