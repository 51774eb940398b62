"""Graphs after the pass: the same numbers, without the concatenations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_flying.compilation.concatenation import DissolveConcatenations, dissolve_concatenations

_cat = torch.ops.aten.cat.default


def _cats(graph: GraphModule) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=_cat))


def _rewritten(function: Callable[..., object], *inputs: torch.Tensor) -> tuple[GraphModule, int]:
    """The function's graph after the pass, and how many concatenations it had before; what it gives is compared."""
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    before = _cats(graph)
    expected = graph(*inputs)
    dissolve_concatenations(graph.graph)
    graph.graph.lint()
    graph.recompile()
    for got, value in zip(graph(*inputs), expected, strict=True):
        # Not bit by bit: what torch vectorizes differs with the width, and so does the last bit of an exponential.
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)
    return graph, before


def _tiles(rows: int = 5, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    first, second = torch.randn(2, rows, width, generator=generator)
    return first, second


def _together(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([first[:, :8], second[:, :8], first[:, 8:], second[:, 8:]], dim=-1)


def test_an_mlp_of_two_tiles() -> None:
    """Gate and up of both tiles, multiplied, and a tile's columns of that: nothing is put together at any time."""

    def mlp(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        whole = _together(first, second)
        product = torch.nn.functional.silu(whole[..., :16]) * whole[..., 16:]
        return [product[..., :8], product[..., 8:]]

    graph, before = _rewritten(mlp, *_tiles())
    assert (before, _cats(graph)) == (1, 0)


def test_a_split_into_the_parts_themselves() -> None:
    """Query, key and value of row ranges, each a multiplication of its own."""

    def attention(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        query, key, value = torch.cat([first, second, second * 2], dim=-1).split([16, 16, 16], dim=-1)
        return [query.view(-1, 4, 4), key.view(-1, 4, 4), value.view(-1, 4, 4)]

    graph, before = _rewritten(attention, *_tiles())
    assert (before, _cats(graph)) == (1, 0)


def test_what_is_computed_is_put_together_once() -> None:
    """Put together as it is computed, instead of before."""

    def function(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        return [torch.sigmoid(_together(first, second) * 2).view(-1)]

    graph, before = _rewritten(function, *_tiles())
    assert (before, _cats(graph)) == (1, 1)
    (cat,) = graph.graph.find_nodes(op="call_function", target=_cat)
    assert [part.target for part in cat.args[0]] == [torch.ops.aten.sigmoid.default] * 4


def test_what_is_needed_whole_stays() -> None:
    """A slice of several parts that goes on whole, a slice within a part, a step, a row vector beside, other types: as it was."""
    weight = torch.randn(32)

    def heads(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        return [_together(first, second)[..., :16].unflatten(-1, (4, 4))]

    def within(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        return [_together(first, second)[..., 4:]]

    def step(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        return [_together(first, second)[..., :8:2]]

    def vector(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        return [_together(first, second) * weight]

    def returned(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        whole = _together(first, second)
        return [whole, whole[..., :8]]

    def other_types(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([first, second.double()], dim=-1)[:, :16]]

    for function, inputs in ((other_types, ()), (heads, ()), (within, ()), (step, ()), (vector, (weight,)), (returned, ())):
        graph, _ = _rewritten(function, *_tiles(), *inputs)
        assert graph.code == make_fx(function, tracing_mode="fake")(*_tiles(), *inputs).code, function.__name__


def test_rows_and_bounds_that_differ_by_the_call() -> None:
    """Any number of rows is fine; a slice that goes as far as there are rows may end anywhere."""

    class Mlp(torch.nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
            whole, other = _together(first, second), _together(second, first)
            product = torch.nn.functional.silu(whole[..., :16]) * whole[..., 16:]
            return [product[..., :8], product[..., 8:], other[:, : first.shape[0]] * 2, first.sum(-1) * second.sum(-1)]

    rows = torch.export.Dim("rows", max=30)
    module = torch.export.export(Mlp(), _tiles(), dynamic_shapes=({0: rows}, {0: rows})).module()
    expected = module(*_tiles(7))
    assert dissolve_concatenations(module.graph) == 1 and _cats(module) == 1
    module.recompile()
    for got, value in zip(module(*_tiles(7)), expected, strict=True):
        torch.testing.assert_close(got, value)


def test_a_concatenation_of_concatenations() -> None:
    """The outer one goes; the inner ones are its parts and stay, also those that are put together on the way."""

    def function(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        inner = torch.cat([first, second], dim=-1)
        outer = torch.cat([inner, torch.sigmoid(torch.cat([second, first], dim=-1))], dim=-1)
        return [torch.nn.functional.silu(outer[:, :32]), outer[:, 32:]]

    graph, before = _rewritten(function, *_tiles())
    assert (before, _cats(graph)) == (3, 2)


_KINDS = st.sampled_from(["cat", "slice", "split", "silu", "scale", "add", "column", "heads"])
_STEPS = st.lists(st.tuples(_KINDS, st.integers(0, 99)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(steps=_STEPS)
def test_any_program_gives_the_same(steps: list[tuple[str, int]]) -> None:
    """Random programs of concatenations, slices and more: the same numbers."""

    def program(first: torch.Tensor, second: torch.Tensor, column: torch.Tensor) -> list[torch.Tensor]:
        pool = [first, second]
        for step, seed in steps:
            x, other = pool[seed % len(pool)], pool[seed // 7 % len(pool)]
            width = x.shape[-1]
            same = [tensor for tensor in pool if tensor.shape == x.shape]
            if step == "cat" and width + other.shape[-1] <= 128:
                pool.append(torch.cat([x, other, x], dim=-1))
            elif step == "slice":
                pool.append(x[:, width // 4 * (seed % 3) :] if seed % 2 else x[:, : width // 2])
            elif step == "split":
                pool.extend(x.split([width // 2, width - width // 2], dim=-1))
            elif step == "silu":
                pool.append(torch.nn.functional.silu(x))
            elif step == "scale":
                pool.append(x * 1.5)
            elif step == "add":
                pool.append(x + same[seed % len(same)])
            elif step == "column":
                pool.append(x * column)
            elif step == "heads":
                pool.append(x.reshape(-1, 1, width).flatten(1))
        return pool[2:][-3:]

    _rewritten(program, *_tiles(), torch.randn(5, 1))


def test_passes_of_one_version_share_their_cache_key() -> None:
    """So workers use what another one compiled."""
    assert DissolveConcatenations().uuid() == DissolveConcatenations().uuid() != ""
