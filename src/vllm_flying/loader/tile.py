"""One tile of a weight: a small linear layer that vLLM packs for the device as it packs any other.

May import torch and vllm. On CPU vLLM repacks each linear weight into an opaque form that can't be sliced any more;
packed tile by tile, one copy still serves every degree.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform


class Tile(nn.Module):
    """`y = x @ weight.T + bias` for a slice of a layer's weight `[rows, columns]`."""

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
