"""One KV pool for every layout: the same bytes, seen with other block and head counts.

May import torch and vllm. vLLM keeps a worker's whole KV cache in one raw buffer and addresses it by strides. In a
group of `width` engines a page holds `block_size * width` tokens of `kv_heads / width` heads: the same bytes. The
*kernel* block keeps its size in every layout, so a page is `width` kernel blocks, each with the inner form that the
page has at width 1 restricted to a head range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig


class KVLayoutError(RuntimeError):
    """A KV cache that can't be shared between layouts; the text says why."""


def wide_kv_cache_config(config: KVCacheConfig, width: int) -> KVCacheConfig:
    """The KV cache config of a group of `width` engines over the pool that `config` describes."""
    wide = deepcopy(config)
    for group in wide.kv_cache_groups:
        spec = group.kv_cache_spec
        if type(spec) is not FullAttentionSpec:
            raise KVLayoutError(
                f"layers {group.layer_names[:2]}... keep a {type(spec).__name__}; only models whose layers all keep "
                "full attention KV can change their layout"
            )
        if spec.num_kv_heads % width:
            raise KVLayoutError(f"{spec.num_kv_heads} KV heads per worker can't be shared by groups of {width} engines")
        group.kv_cache_spec = replace(
            spec, block_size=spec.block_size * width, num_kv_heads=spec.num_kv_heads // width
        )
        if group.kv_cache_spec.page_size_bytes != spec.page_size_bytes:
            raise KVLayoutError(
                f"a page has {spec.page_size_bytes} bytes alone and {group.kv_cache_spec.page_size_bytes} in a group "
                f"of {width}; they must be equal"
            )
    if wide.hash_block_size:
        wide.hash_block_size *= width
    if wide.cache_hit_alignment_tokens:
        wide.cache_hit_alignment_tokens *= width
    return wide


def raw_pool(runner: Any) -> torch.Tensor:
    """The int8 buffer behind a runner's KV cache views."""
    storage = runner.kv_caches[0].untyped_storage()
    return torch.empty(0, dtype=torch.int8, device=runner.kv_caches[0].device).set_(
        storage, 0, (storage.nbytes(),), (1,)
    )


class SharedPool(TorchFunctionMode):
    """Context in which vLLM's KV allocation gets an existing buffer instead of a new one."""

    def __init__(self, pool: torch.Tensor) -> None:
        super().__init__()
        self._pool = pool

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") is torch.int8 and args == (self._pool.numel(),):
            return self._pool
        return func(*args, **kwargs)


@contextmanager
def kernel_blocks_of(runner: Any) -> Iterator[None]:
    """Context in which the attention backends of `runner` offer its kernel block size only.

    Runners initialised inside split their larger pages into kernel blocks of the size that `runner` uses.
    """
    groups = [group for groups in runner.attn_groups for group in groups]
    backends = {group.backend for group in groups}
    size = kernel_block_size(runner)
    with ExitStack() as stack:
        for backend in backends:
            stack.enter_context(_attribute(backend, "get_supported_kernel_block_sizes", staticmethod(_only(size))))
        yield


def kernel_block_size(runner: Any) -> int:
    """Tokens per kernel block of an initialised runner (both model runners keep them, under two names)."""
    sizes = getattr(runner, "_kernel_block_sizes", None) or getattr(runner, "kernel_block_sizes", None)
    if not sizes or len(set(sizes)) != 1:
        raise KVLayoutError(f"the model runner has kernel block sizes {sizes}; exactly one is needed")
    return int(sizes[0])


def _only(size: int) -> Callable[..., list[int]]:
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [size]

    return get_supported_kernel_block_sizes


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    had_own = name in vars(owner)
    previous = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, previous)
        else:
            delattr(owner, name)
