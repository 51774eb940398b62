"""Give a wider layout's model the resident weights: tiles or views for sharded layers, the same tensors for the rest.

May import torch and vllm. The model arrives built on the meta device; afterwards nothing in it owns memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_flying.core.tiles import TilePlan, tiles_of_rank
from vllm_flying.loader.cutting import UnsupportedModelError, check_supported, is_sharded_linear
from vllm_flying.loader.methods import (
    PlainEmbeddingMethod,
    RowRangesMethod,
    TiledColumnsMethod,
    TiledEmbeddingMethod,
    TiledRowsMethod,
)
from vllm_flying.loader.resident import ResidentWeights


def bind_model(model: nn.Module, resident: ResidentWeights, ratio: int, position: int) -> None:
    """Bind `model`, built for groups of `ratio` engines, to the shares of the worker at `position` in its group."""
    source_modules = dict(resident.model.named_modules())
    tiles = tiles_of_rank(resident.num_tiles, ratio, position)
    for name, module in model.named_modules():
        source = source_modules.get(name)
        if source is None:
            raise UnsupportedModelError(f"module {name!r} exists in groups of {ratio} engines only; it can't be bound")
        if source is module:
            continue
        check_supported(name, module)
        if name in resident.cut_layers:
            _bind_tiles(name, module, source, resident, tiles)
        elif is_sharded_linear(module):
            _bind_views(module, source, resident.num_tiles, tiles)
        elif isinstance(module, VocabParallelEmbedding):
            module.quant_method = PlainEmbeddingMethod()
            module.cpu_linear = torch.nn.functional.linear
            _share_rows(module, source, "weight")
            _share_vocabulary_bias(module, source)
        else:
            _share_parameters(name, module, source)
        _share_buffers(name, module, source)
        lacking = [key for key, _ in source.named_parameters(recurse=False) if getattr(module, key, None) is None]
        if lacking:
            raise UnsupportedModelError(f"layer {name} gets {lacking} while its weights load; that can't be bound")
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if left:
        raise UnsupportedModelError(f"tensors {left[:5]} could not be bound to the resident weights")


def _bind_tiles(name: str, module: nn.Module, source: nn.Module, resident: ResidentWeights, tiles: range) -> None:
    cut = resident.cut_layers[name]
    if isinstance(module, VocabParallelEmbedding):
        module.quant_method = TiledEmbeddingMethod(TiledRowsMethod(cut, tiles))
        if source.weight.numel():
            _share_rows(module, source, "weight")
        else:
            module.weight = source.weight
        _share_vocabulary_bias(module, source)
        return
    module.quant_method = (TiledRowsMethod if cut.by_rows else TiledColumnsMethod)(cut, tiles)
    module.weight = source.weight
    if getattr(module, "bias", None) is not None:
        # Rows: the tiles carry the bias, only its presence counts. Columns: vLLM adds it on the first rank.
        module.bias = source.bias


def _bind_views(module: nn.Module, source: nn.Module, num_tiles: int, tiles: range) -> None:
    weight = source.weight.data
    if isinstance(module, RowParallelLinear):
        plan = TilePlan((source.input_size_per_partition,), num_tiles)
        ((start, stop),) = plan.shard_ranges(tiles)
        module.weight = _parameter(weight[:, start:stop])
        module.cpu_linear = torch.nn.functional.linear
        if module.bias is not None:
            module.bias = source.bias
        return
    assert isinstance(module, ColumnParallelLinear)
    ranges = TilePlan(tuple(source.output_partition_sizes), num_tiles).shard_ranges(tiles)
    biases = None if module.bias is None else [source.bias.data[start:stop] for start, stop in ranges]
    module.quant_method = RowRangesMethod([weight[start:stop] for start, stop in ranges], biases)
    module.weight = _parameter(weight[:0])
    if module.bias is not None:
        module.bias = source.bias


def _share_rows(module: nn.Module, source: nn.Module, name: str) -> None:
    """Bind a vocabulary-parallel tensor to its row range of the resident one."""
    rows, resident_rows = module.num_embeddings_per_partition, source.num_embeddings_per_partition
    width = module.tp_size // source.tp_size
    if rows * width != resident_rows:
        raise UnsupportedModelError(f"{resident_rows} padded vocabulary rows can't be cut into {width} times {rows}")
    # Ranks are numbered shard by shard: rank = the source's rank * width + position in the group.
    start = (module.tp_rank - source.tp_rank * width) * rows
    setattr(module, name, _parameter(getattr(source, name).data[start : start + rows]))


def _share_vocabulary_bias(module: nn.Module, source: nn.Module) -> None:
    # Asked of the source: some models register an output head's bias only when they meet it in the checkpoint.
    if getattr(source, "bias", None) is not None:
        _share_rows(module, source, "bias")


def _share_parameters(name: str, module: nn.Module, source: nn.Module) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        resident = getattr(source, key)
        if resident.shape != parameter.shape:
            raise UnsupportedModelError(
                f"parameter {name}.{key} is {tuple(parameter.shape)} here and {tuple(resident.shape)} alone, and its "
                "layer isn't one of vLLM's parallel layers; this model can't change its layout"
            )
        setattr(module, key, _parameter(resident.data))
    if hasattr(source, "cpu_linear"):
        module.cpu_linear = source.cpu_linear


def _share_buffers(name: str, module: nn.Module, source: nn.Module) -> None:
    for key, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta:
            resident = getattr(source, key)
            if resident.shape != buffer.shape:
                raise UnsupportedModelError(f"buffer {name}.{key} depends on the layout; it can't be bound")
            module._buffers[key] = resident
    for key, value in list(vars(module).items()):
        if isinstance(value, torch.Tensor) and value.is_meta:
            setattr(module, key, getattr(source, key))


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
