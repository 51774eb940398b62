"""Tiles in vLLM's other packing for CPU: blocks of output rows, one after the other, so that neighbours are one tile.

May import torch and vllm. vLLM packs most weights for oneDNN, in a form that only oneDNN can read, and some for kernels of
its own, where block follows block: a range of rows is a slice of that. Up to four rows of input these kernels take a fifth to
a half less time than oneDNN without AMX, from five on about as much, for weights of the sizes that `suits` names;
`docs/benchmarks.md` has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm._custom_ops import weight_packed_linear_cpu
from vllm.platforms import current_platform

from vllm_flying.loader.tile import Tile

# Output rows per block, and what the kernels want of the columns.
BLOCK = 32
# Columns above which the kernels fall behind from five rows on: they hold a block's columns in the cache at once.
MOST_COLUMNS = 4096
# Below so many columns they fall behind for very tall weights, such as output heads.
FEW_COLUMNS, MOST_ROWS_OF_FEW = 2048, 16384


def suits(weight: torch.Tensor, tile_rows: int) -> bool:
    """Whether these kernels are the quicker ones for a weight `[rows, columns]` in tiles of `tile_rows`."""
    rows, columns = weight.shape
    if not current_platform.is_cpu() or weight.dtype != torch.bfloat16:
        return False
    # With AMX vLLM's own choice stands: it is by size there.
    if not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return False
    if not hasattr(torch.ops._C, "weight_packed_linear") or tile_rows % BLOCK or columns % BLOCK:
        return False
    tall = rows > MOST_ROWS_OF_FEW
    return columns <= MOST_COLUMNS and not (tall and columns < FEW_COLUMNS)


class BlockedTile(Tile):
    """A range of rows of a packed weight `[all rows, columns]`."""

    def __init__(self, packed: torch.Tensor, bias: torch.Tensor | None, rows: range) -> None:
        super().__init__()
        self._packed, self._bias, self._rows = packed, bias, rows
        self._own_rows = packed[rows.start : rows.stop]
        self._own_bias = None if bias is None else bias[rows.start : rows.stop]
        self.num_bytes = self._own_rows.numel() * packed.element_size()

    def forward(self, x: torch.Tensor, with_bias: bool) -> torch.Tensor:
        """`x` is `[..., columns]`; returns `[..., rows]`."""
        bias = self._own_bias if with_bias else None
        output: torch.Tensor = weight_packed_linear_cpu(x, self._own_rows, len(self._rows), bias)
        return output

    def joined(self, neighbours: Sequence[Tile]) -> Tile | None:
        """This tile and those whose rows follow it, of the same weight."""
        last = self
        for tile in neighbours:
            if not isinstance(tile, BlockedTile) or tile._packed is not self._packed or tile._rows.start != last._rows.stop:
                return None
            last = tile
        return BlockedTile(self._packed, self._bias, range(self._rows.start, last._rows.stop))


def blocked_tiles(weight: torch.Tensor, bias: torch.Tensor | None, tile_rows: int) -> list[BlockedTile]:
    """A weight `[rows, columns]`, its tiles' rows one after the other, in tiles of `tile_rows`, as neighbours."""
    packed: torch.Tensor = torch.ops._C.convert_weight_packed(weight)
    bias = None if bias is None else bias.to(torch.float32)
    return [BlockedTile(packed, bias, range(start, start + tile_rows)) for start in range(0, len(packed), tile_rows)]
