"""How one copy of a weight serves every degree: cut at the widest degree, used in ranges.

Pure: no torch, no vllm. A worker's resident shard is cut into `num_tiles` tiles, one per narrower rank of the widest
degree it takes part in. In a group of ratio `p` (group degree over engine degree) a worker needs `num_tiles / p`
neighbouring tiles. A fused layer (query/key/value, gate/up) has several *parts*; each tile holds its slice of every
part, in part order, so that a tile is exactly the shard vLLM would load at the widest degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TileError(ValueError):
    """A weight that can't be cut: the text says which size and by what."""


Range = tuple[int, int]


@dataclass(frozen=True)
class TilePlan:
    """Where the tiles of one weight lie along its sharded dimension.

    `part_sizes` are the rows (or columns) of each fused part of the resident shard.
    """

    part_sizes: tuple[int, ...]
    num_tiles: int

    def __post_init__(self) -> None:
        for size in self.part_sizes:
            if size % self.num_tiles:
                raise TileError(
                    f"a part of {size} rows can't be cut into {self.num_tiles} equal tiles; choose group widths "
                    "that divide the model's heads, intermediate size and padded vocabulary"
                )

    @property
    def tile_part_sizes(self) -> tuple[int, ...]:
        """Rows of each part inside one tile."""
        return tuple(size // self.num_tiles for size in self.part_sizes)

    @property
    def tile_size(self) -> int:
        """Rows of one tile, all parts together."""
        return sum(self.tile_part_sizes)

    def tile_ranges(self, tile: int) -> list[Range]:
        """Row ranges of the resident weight that make up `tile`, in part order."""
        return self.shard_ranges(range(tile, tile + 1))

    def shard_ranges(self, tiles: range) -> list[Range]:
        """Row ranges of the resident weight that a neighbouring run of tiles covers, one per part."""
        ranges, offset = [], 0
        for size, width in zip(self.part_sizes, self.tile_part_sizes, strict=True):
            ranges.append((offset + tiles.start * width, offset + tiles.stop * width))
            offset += size
        return ranges

    def output_slices(self, tiles: range) -> list[list[tuple[Range, Range]]]:
        """For each tile of the run: (range in the tile's output, range in the shard's output), one per part.

        The shard's output is in part order, as vLLM's fused layers expect it; a tile's output holds one slice of each.
        """
        placed = []
        for position in range(len(tiles)):
            moves, source, target = [], 0, 0
            for width in self.tile_part_sizes:
                start = target + position * width
                moves.append(((source, source + width), (start, start + width)))
                source += width
                target += width * len(tiles)
            placed.append(moves)
        return placed


def tiles_of_rank(num_tiles: int, ratio: int, position: int) -> range:
    """Tiles that the worker at `position` (0 .. ratio-1) of a group of `ratio` engines uses."""
    if ratio < 1 or num_tiles % ratio or not 0 <= position < ratio:
        raise TileError(f"position {position} of ratio {ratio} is not a share of {num_tiles} tiles")
    share = num_tiles // ratio
    return range(position * share, (position + 1) * share)


def check_divides(sizes: Sequence[tuple[str, int]], degree: int) -> list[str]:
    """Reasons why a model can't be cut `degree` ways: one text per size that `degree` does not divide."""
    return [
        f"{name} = {size} is not a multiple of the tensor-parallel degree {degree}" for name, size in sizes if size % degree
    ]
