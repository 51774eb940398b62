"""One tile of a weight: a small linear layer that is packed for the device by itself.

May import torch and vllm. On CPU vLLM repacks each linear weight into an opaque form that can't be sliced any more;
packed tile by tile, one copy still serves every degree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform


class Tile(nn.Module, ABC):
    """`y = x @ weight.T + bias` for a slice of a layer's weight `[rows, columns]`."""

    num_bytes: int
    """Of its weight, without the bias."""

    @abstractmethod
    def forward(self, x: torch.Tensor, with_bias: bool) -> torch.Tensor:
        """`x` is `[..., columns]`; returns `[..., rows]`."""

    def joined(self, neighbours: Sequence[Tile]) -> Tile | None:
        """One tile that gives the shard of this one and the next ones, part by part; None if their packing keeps them apart."""
        return None if neighbours else self


class StockTile(Tile):
    """A tile that vLLM packs as it packs any other weight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.num_bytes = weight.numel() * weight.element_size()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(self, remove_weight=True)
        else:
            self.cpu_linear = nn.functional.linear

    def forward(self, x: torch.Tensor, with_bias: bool) -> torch.Tensor:
        """`x` is `[..., columns]`; returns `[..., rows]`."""
        output: torch.Tensor = self.cpu_linear(x, self.weight, self.bias if with_bias else None)
        return output
