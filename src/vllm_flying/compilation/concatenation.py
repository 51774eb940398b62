"""Graph pass: concatenations that are only worked on element by element and taken apart again go away.

May import torch and vllm. A layer's output comes from several tiles or row ranges, and the model gets them put together:
gate and up of an MLP, for one, whose halves are then multiplied, and of which the next layer's tiles take columns. Of
that torch.compile makes a copy of everything. But `slice(cat(a, b))` is `a`, and `silu(cat(a, b))` is
`cat(silu(a), silu(b))`: each part can go its own way, with exactly the same numbers.

vLLM runs the pass after its own ones, on functional graphs.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

logger = init_logger("vllm.flying.compilation")

_aten = torch.ops.aten
# Along the last dimension, the sizes of the parts that a node can be had in.
_Sizes = tuple[int, ...]


class DissolveConcatenations(InductorPass):
    """Lets the parts of concatenations along the last dimension go their own ways, wherever nobody needs the whole."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite `graph` in place."""
        logger.debug("Compiled graph: %d concatenations went away.", dissolve_concatenations(graph))

    def uuid(self) -> str:
        """Changes with this file: nothing that was compiled with another version of the pass is used."""
        return str(InductorPass.hash_source(Path(__file__).read_text()))


def use_pass(vllm_config: VllmConfig) -> None:
    """Have vLLM run the pass when it compiles models of this config. A pass that the user put there stays instead."""
    vllm_config.compilation_config.inductor_compile_config.setdefault(current_platform.pass_key, DissolveConcatenations())


def dissolve_concatenations(graph: Graph) -> int:
    """Rewrite `graph` in place; returns how many concatenations went away."""
    for node in graph.find_nodes(op="call_function", target=_aten.split_with_sizes.default):
        if _is_cat(node.args[0]) and _is_last(node, *node.args[2:]):
            _split_by_slices(graph, node)
    sizes = _in_parts(graph)
    _keep_whole_what_is_needed_so(sizes)
    parts: dict[Node, list[Node]] = {}
    for node in sizes:
        parts[node] = _make_parts(graph, node, sizes, parts)
        _hand_out(graph, node, sizes, parts[node])
    for node in reversed(sizes):
        graph.erase_node(node)
    return sum(_is_cat(node) for node in sizes)


def _in_parts(graph: Graph) -> dict[Node, _Sizes]:
    """Nodes that could be had in parts, in the graph's order."""
    sizes: dict[Node, _Sizes] = {}
    for node in graph.nodes:
        found: _Sizes | None = None
        if _is_cat(node):
            widths = tuple(width for part in node.args[0] if (width := _width(part)) is not None)
            if len(widths) == len(node.args[0]) and all(_dtype(part) == _dtype(node) for part in node.args[0]):
                found = widths
        elif _is_slice(node) and node.args[0] in sizes:
            which = _parts_within(sizes[node.args[0]], *node.args[2:4])
            found = None if which is None else sizes[node.args[0]][which]
        elif _is_pointwise(node):
            whole = [arg for arg in node.all_input_nodes if _width(arg) != 1]
            common = {sizes.get(arg) for arg in whole}
            found = common.pop() if len(common) == 1 and all(_width(arg) == _width(node) for arg in whole) else None
        if found:
            sizes[node] = found
    return sizes


def _keep_whole_what_is_needed_so(sizes: dict[Node, _Sizes]) -> None:
    """Leave out all that would cost a copy elsewhere: only what is computed may be put together, as it is computed."""
    before = -1
    while before != len(sizes):
        before = len(sizes)
        for node in reversed(list(sizes)):
            needed_whole = (
                not _is_pointwise(node)
                and (_is_cat(node) or len(sizes[node]) > 1)
                and any(_takes_it_whole(user, sizes) for user in node.users)
            )
            sources = () if _is_cat(node) else [arg for arg in node.all_input_nodes if _width(arg) != 1]
            if needed_whole or any(source not in sizes for source in sources):
                del sizes[node]


def _make_parts(graph: Graph, node: Node, sizes: dict[Node, _Sizes], parts: dict[Node, list[Node]]) -> list[Node]:
    if _is_cat(node):
        return list(node.args[0])
    if _is_slice(node):
        source = node.args[0]
        which = _parts_within(sizes[source], *node.args[2:4])
        assert which is not None
        return parts[source][which]
    sources = {arg: parts[arg] for arg in node.all_input_nodes if arg in parts}
    made = []
    with graph.inserting_before(node):
        for own in zip(*sources.values()):
            instead = dict(zip(sources, own))
            args, kwargs = map_arg((node.args, node.kwargs), lambda arg, instead=instead: instead.get(arg, arg))
            made.append(_call(graph, node, node.target, args, kwargs))
    return made


def _hand_out(graph: Graph, node: Node, sizes: dict[Node, _Sizes], parts: list[Node]) -> None:
    """Give those who aren't in parts themselves the only part, or the parts put together."""
    outside = [user for user in node.users if _takes_it_whole(user, sizes)]
    if not outside:
        return
    whole = parts[0]
    if len(parts) > 1:
        with graph.inserting_after(node):
            whole = _call(graph, node, _aten.cat.default, (parts, node.meta["val"].ndim - 1), {})
    for user in outside:
        user.replace_input_with(node, whole)
        # How custom ops' inputs lay in memory before: a part is dense where a slice was not.
        user.meta.pop("eager_input_vals", None)


def _takes_it_whole(user: Node, sizes: dict[Node, _Sizes]) -> bool:
    """A concatenation has as parts what it is made of, whatever that is made of itself."""
    return user not in sizes or _is_cat(user)


def _split_by_slices(graph: Graph, split: Node) -> None:
    stops = list(accumulate(split.args[1]))
    for user in list(split.users):
        stop = stops[user.args[1]]
        with graph.inserting_before(user):
            args = (split.args[0], user.meta["val"].ndim - 1, stop - split.args[1][user.args[1]], stop)
            user.replace_all_uses_with(_call(graph, user, _aten.slice.Tensor, args, {}))
        graph.erase_node(user)
    graph.erase_node(split)


def _call(graph: Graph, instead_of: Node, target: Any, args: Any, kwargs: Any) -> Node:
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: value for key, value in instead_of.meta.items() if key != "eager_input_vals"}
    values, keyword_values = map_arg((args, kwargs), lambda arg: arg.meta["val"])
    mode = detect_fake_mode((values, keyword_values))
    assert mode is not None
    with mode:
        node.meta["val"] = target(*values, **keyword_values)
    return node


def _parts_within(sizes: _Sizes, start: Any = None, stop: Any = None) -> slice | None:
    """Which parts lie between `start` and `stop`; None if a part lies there in part only, or none."""
    ends = [0, *accumulate(sizes)]
    start, stop = 0 if start is None else start, ends[-1] if stop is None else stop
    if not isinstance(start, int) or not isinstance(stop, int):  # a bound that depends on another size
        return None
    stop = min(stop, ends[-1])
    if start not in ends or stop not in ends or start >= stop:
        return None
    return slice(ends.index(start), ends.index(stop))


def _is_cat(node: Any) -> bool:
    return isinstance(node, Node) and node.target is _aten.cat.default and _is_last(node, *node.args[1:])


def _is_slice(node: Node) -> bool:
    # The fifth argument is the step.
    return node.target is _aten.slice.Tensor and len(node.args) < 5 and _is_last(node, *node.args[1:2])


def _is_pointwise(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return False
    return not target._schema.is_mutable and isinstance(node.meta.get("val"), torch.Tensor)


def _is_last(node: Node, dimension: int = 0) -> bool:
    value = node.meta["val"]
    dimensions = (value[0] if isinstance(value, (tuple, list)) else value).ndim
    return dimension in (-1, dimensions - 1)


def _width(node: Node) -> int | None:
    """Size along the last dimension; 1 for what has none, None if it isn't the same in every call."""
    value = node.meta.get("val")
    size = value.shape[-1] if isinstance(value, torch.Tensor) and value.ndim else 1
    return size if isinstance(size, int) else None


def _dtype(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
