"""Cut the layers of a freshly loaded model into tiles, layer by layer, so that only one layer exists twice at a time.

May import torch and vllm. Works on vLLM's own parallel layer classes; no model is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_flying.core.tiles import Range, TilePlan
from vllm_flying.loader.blocked import blocked_tiles, suits
from vllm_flying.loader.methods import (
    PlainEmbeddingMethod,
    TiledColumnsMethod,
    TiledEmbeddingMethod,
    TiledRowsMethod,
)
from vllm_flying.loader.resident import CutLayer, ResidentWeights
from vllm_flying.loader.tile import StockTile, Tile


class UnsupportedModelError(RuntimeError):
    """A model this plugin can't change the layout of; the text names the layer and the reason."""


def is_sharded_linear(module: nn.Module) -> bool:
    """True for vLLM's linear layers that split over tensor-parallel ranks."""
    return isinstance(module, LinearBase) and not isinstance(module, ReplicatedLinear) and not module.disable_tp


def check_supported(name: str, module: nn.Module) -> None:
    """Refuse layers whose weights can't be cut."""
    if is_sharded_linear(module):
        if type(module.quant_method) is not UnquantizedLinearMethod:
            raise UnsupportedModelError(
                f"layer {name} uses {type(module.quant_method).__name__}; quantised weights can't change their layout yet"
            )
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            raise UnsupportedModelError(f"layer {name} is a {type(module).__name__}, which can't be cut into tiles")
    elif isinstance(module, VocabParallelEmbedding) and type(module.quant_method) is not UnquantizedEmbeddingMethod:
        raise UnsupportedModelError(
            f"layer {name} uses {type(module.quant_method).__name__}; quantised embeddings can't change their layout yet"
        )


def cut_model(resident: ResidentWeights, blocked: bool) -> None:
    """Cut every sharded layer of the resident model; the layers then compute from all their tiles.

    `blocked`: tiles are packed in blocks where that is quicker, else all as vLLM packs them.
    """
    all_tiles = range(resident.num_tiles)
    embeddings = [m for m in resident.model.modules() if isinstance(m, VocabParallelEmbedding)]
    heads = [m for m in embeddings if isinstance(m, ParallelLMHead)] or embeddings
    looked_up = {m.weight.data_ptr() for m in embeddings if not isinstance(m, ParallelLMHead)}
    for name, module in resident.model.named_modules():
        check_supported(name, module)
        if is_sharded_linear(module):
            cut = _cut_linear(module, resident.num_tiles, blocked)
            resident.cut_layers[name] = cut
            module.quant_method = (TiledRowsMethod if cut.by_rows else TiledColumnsMethod)(cut, all_tiles)
            _drop_weight(module)
        elif any(module is head for head in heads):
            cut = _cut_rows(module, TilePlan(tuple(module.output_partition_sizes), resident.num_tiles), blocked)
            resident.cut_layers[name] = cut
            dtype = _logits_dtype(resident.model) if module.tp_size == 1 else None
            module.quant_method = TiledEmbeddingMethod(TiledRowsMethod(cut, all_tiles, dtype))
            if module.weight.data_ptr() not in looked_up:
                _drop_weight(module)
        elif isinstance(module, VocabParallelEmbedding):
            module.quant_method = PlainEmbeddingMethod()


def _logits_dtype(model: nn.Module) -> torch.dtype | None:
    """What samplers turn logits into, if nobody computes with them before; nor must they be gathered in that form."""
    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    untouched = all(each.scale == 1.0 and each.soft_cap is None for each in processors)
    return torch.float32 if untouched else None


def _cut_linear(module: nn.Module, num_tiles: int, blocked: bool) -> CutLayer:
    if isinstance(module, RowParallelLinear):
        plan = TilePlan((module.input_size_per_partition,), num_tiles)
        weight = module.weight.data
        columns = [(start, stop) for tile in range(num_tiles) for start, stop in plan.tile_ranges(tile)]
        all_rows = [[(0, len(weight))]]
        tiles = tuple(tile for start, stop in columns for tile in row_tiles(weight[:, start:stop], None, all_rows, blocked))
        return CutLayer(plan, tiles, by_rows=False)
    assert isinstance(module, ColumnParallelLinear)
    return _cut_rows(module, TilePlan(tuple(module.output_partition_sizes), num_tiles), blocked)


def _cut_rows(module: nn.Module, plan: TilePlan, blocked: bool) -> CutLayer:
    weight: torch.Tensor = module.weight.data
    bias: torch.Tensor | None = None if getattr(module, "bias", None) is None else module.bias.data
    ranges = [plan.tile_ranges(tile) for tile in range(plan.num_tiles)]
    return CutLayer(plan, tuple(row_tiles(weight, bias, ranges, blocked)), by_rows=True)


def row_tiles(
    weight: torch.Tensor, bias: torch.Tensor | None, ranges: Sequence[Sequence[Range]], blocked: bool
) -> list[Tile]:
    """Tiles of a weight `[rows, columns]`: the row ranges of each."""
    if blocked and suits(weight, chain.from_iterable(ranges)):
        return [*blocked_tiles(weight, bias, ranges)]
    return [StockTile(_rows(weight, tile), None if bias is None else _rows(bias, tile)) for tile in ranges]


def _rows(tensor: torch.Tensor, ranges: Sequence[Range]) -> torch.Tensor:
    return torch.cat([tensor[start:stop] for start, stop in ranges])


def _drop_weight(module: nn.Module) -> None:
    # Layers and runners ask a weight for its dtype and device, so an empty one stays.
    module.weight = nn.Parameter(module.weight.data.new_empty(0), requires_grad=False)
