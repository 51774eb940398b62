"""Tiles in vLLM's other packing for CPU: blocks of output rows, one after the other, so that a tile is slices of them.

May import torch and vllm. vLLM packs most weights for oneDNN, in a form that only oneDNN can read, and some for kernels of
its own, where block follows block: a range of rows is a slice of that, and the kernels write where they are told. The
whole weight is then one multiplication with nothing to be put together, and a share of a fused one (query/key/value,
gate/up) is one per part. Up to four rows of input these kernels take a fifth to a half less time than oneDNN without
AMX, from eight on about as much, for weights of the sizes that `suits` names; `docs/benchmarks.md` has the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from vllm._custom_ops import weight_packed_linear_cpu
from vllm.platforms import current_platform

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


class BlockedTile(Tile):
    """Some row ranges, one after the other, of a packed weight `[all rows, columns]`."""

    def __init__(self, packed: torch.Tensor, bias: torch.Tensor | None, ranges: Sequence[Range]) -> None:
        super().__init__()
        self._packed, self._bias, self._ranges = packed, bias, _without_seams(ranges)
        self._weights = [packed[start:stop] for start, stop in self._ranges]
        self._biases = [None if bias is None else bias[start:stop] for start, stop in self._ranges]
        self._size = sum(stop - start for start, stop in ranges)
        self.num_bytes = self._size * packed.shape[1] * packed.element_size()

    def forward(self, x: torch.Tensor, with_bias: bool) -> torch.Tensor:
        """`x` is `[..., columns]`; returns `[..., rows]`."""
        biases = self._biases if with_bias else [None] * len(self._weights)
        if len(self._weights) == 1 or torch.compiler.is_compiling():
            # vLLM compiles without `enable_auto_functionalized_v2`: slices that are written to would be copied, and worse.
            outputs = [weight_packed_linear_cpu(x, w, w.shape[0], bias) for w, bias in zip(self._weights, biases)]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        inputs = x.reshape(-1, x.shape[-1])
        output = inputs.new_empty(inputs.shape[0], self._size)
        begin = 0
        for weight, bias in zip(self._weights, biases):
            end = begin + weight.shape[0]
            torch.ops._C.weight_packed_linear(output[:, begin:end], inputs, weight, bias, True)
            begin = end
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
