"""Linear methods that compute a shard from tiles or from row ranges of the resident weight.

May import torch and vllm. They replace a layer's `quant_method`, vLLM's own place for how a layer multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_flying.core.tiles import Range, TilePlan
from vllm_flying.loader.resident import CutLayer


class _NoWeightsOfItsOwn(LinearMethodBase):
    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this layer uses the resident weights; it must not create its own")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Tiles were packed when they were made."""


class TiledRowsMethod(_NoWeightsOfItsOwn):
    """Column-parallel layer: each tile gives some output rows of every fused part.

    With `dtype`, what is put together of several tiles is converted on the way, at no further cost.
    """

    def __init__(self, cut: CutLayer, tiles: range, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._tiles = cut.joined(tiles)
        self._size = cut.plan.tile_size * len(tiles)
        self._pieces = _pieces(cut.plan, tiles) if len(self._tiles) > 1 else []

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` is `[..., columns]`; returns `[..., rows of the shard]`. Only the presence of `bias` matters."""
        outputs = [tile(x, bias is not None) for tile in self._tiles]
        if len(outputs) == 1:
            return outputs[0]
        if self._dtype is None:
            return torch.cat([outputs[which][..., start:stop] for _, which, (start, stop) in self._pieces], dim=-1)
        result = x.new_empty(*x.shape[:-1], self._size, dtype=self._dtype)
        for to_start, which, (start, stop) in self._pieces:
            result[..., to_start : to_start + stop - start] = outputs[which][..., start:stop]
        return result


def _pieces(plan: TilePlan, tiles: range) -> list[tuple[int, int, Range]]:
    """Where the outputs of tiles go: (first row in the shard, position of the tile, its rows), in the shard's order."""
    return sorted(
        (to_start, position, source)
        for position, moves in enumerate(plan.output_slices(tiles))
        for source, (to_start, _) in moves
    )


class TiledColumnsMethod(_NoWeightsOfItsOwn):
    """Row-parallel layer: each tile takes some input columns; the outputs are summed."""

    def __init__(self, cut: CutLayer, tiles: range) -> None:
        self._tiles = [cut.tiles[tile] for tile in tiles]
        self._columns = cut.plan.tile_size

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` is `[..., columns of the shard]`; returns `[..., rows]`."""
        if len(self._tiles) == 1:
            return self._tiles[0](x, False) if bias is None else self._tiles[0](x, False) + bias
        result = None
        for position, tile in enumerate(self._tiles):
            start = position * self._columns
            output = tile(x[..., start : start + self._columns], False)
            result = output if result is None else result.add_(output)
        assert result is not None
        return result if bias is None else result.add_(bias)


class RowRangesMethod(_NoWeightsOfItsOwn):
    """Fused column-parallel layer over plain weights: the shard is one row range per part of the resident weight."""

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor] | None) -> None:
        self._weights = weights
        self._biases = biases
        self._size = sum(weight.shape[0] for weight in weights)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` is `[..., columns]`; returns `[..., rows of the shard]`. Only the presence of `bias` matters."""
        biases = self._biases if bias is not None and self._biases is not None else [None] * len(self._weights)
        if torch.compiler.is_compiling():
            return torch.cat([torch.nn.functional.linear(x, w, b) for w, b in zip(self._weights, biases)], dim=-1)
        rows = x.reshape(-1, x.shape[-1])
        result = rows.new_empty(rows.shape[0], self._size)
        start = 0
        for weight, part_bias in zip(self._weights, biases):
            part = result[:, start : start + weight.shape[0]]
            torch.mm(rows, weight.t(), out=part)
            if part_bias is not None:
                part += part_bias
            start += weight.shape[0]
        return result.view(*x.shape[:-1], self._size)


class PlainEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Embedding or output head over a plain (unpacked) weight."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Multiply with the weight as it is."""
        layer.cpu_linear = torch.nn.functional.linear


class TiledEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Output head whose product comes from tiles; look-ups, if any, from the plain weight."""

    def __init__(self, rows: TiledRowsMethod) -> None:
        self._rows = rows

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Tiles were packed when they were made."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` is `[..., hidden]`; returns logits `[..., vocabulary rows of the shard]`."""
        return self._rows.apply(layer, x, bias)
