"""The one copy of the weights in a worker: the width-1 model and the tiles its layers were cut into.

May import torch and vllm. The full loader fills it; the view loaders of the wider layouts read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from vllm_flying.core.tiles import TilePlan
from vllm_flying.loader.blocked import BlockedTile
from vllm_flying.loader.tile import Tile


@dataclass(frozen=True)
class CutLayer:
    """A layer's tiles; `by_rows` says whether output rows (column parallel) or input columns were cut."""

    plan: TilePlan
    tiles: tuple[Tile, ...]
    by_rows: bool

    def joined(self, tiles: range) -> list[Tile]:
        """The tiles of a neighbouring run of rows, as one where their packing allows it."""
        first, *others = [self.tiles[tile] for tile in tiles]
        whole = first.joined(others)
        return [first, *others] if whole is None else [whole]


@dataclass
class ResidentWeights:
    """Weights of one worker process."""

    model: nn.Module
    num_tiles: int
    cut_layers: dict[str, CutLayer] = field(default_factory=dict)

    def tile_bytes(self) -> int:
        """Bytes held in tiles, whatever form the device packs them in."""
        return sum(tile.num_bytes for layer in self.cut_layers.values() for tile in layer.tiles)

    def layers_in_blocks(self) -> int:
        """Layers whose tiles are slices of one packed weight."""
        return sum(isinstance(layer.tiles[0], BlockedTile) for layer in self.cut_layers.values())


class _Process:
    """Loaders are made by vLLM from a config alone, so what they share is per process."""

    resident: ResidentWeights | None = None


def keep_resident(resident: ResidentWeights) -> None:
    """Register the weights of this worker."""
    _Process.resident = resident


def resident_weights() -> ResidentWeights:
    """The weights of this worker; RuntimeError before the width-1 model is loaded."""
    if _Process.resident is None:
        raise RuntimeError("the resident weights are not loaded yet; the width-1 layout must be loaded first")
    return _Process.resident
