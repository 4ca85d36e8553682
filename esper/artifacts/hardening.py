"""From a grown model to a plain torch module that needs no Esper at run time.

Every module that carries grafts gets one `torch.fx.GraphModule` as a child called ``grafts``, which
torch also calls as the module's forward hook. So the host's classes, attributes and parameter names
stay as they are (code that reads ``layer.weight`` still can), the module copies, pickles, compiles
and exports as any other, and the graphs hold nothing but torch operators.
"""

import copy
import inspect
import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch import nn

from esper.blueprints import reference_module
from esper.blueprints.kernels import CHANNEL_KINDS
from esper.common.v1 import kernel_pb2
from esper.kasmina import KasminaLayer
from esper.kasmina import MorphableModel
from esper.kasmina import unwrap
from esper.kasmina.grafts import Graft

GRAFTS = "grafts"
"""Name of the child that carries the grafts of a hardened module."""


def harden(model: MorphableModel) -> nn.Module:
    """Returns a plain torch copy of a grown model that computes the same without Esper.

    Grafts whose alpha is above 0 are kept at their present alpha; all other seeds vanish. The
    copy is in the training mode of the model, and trains as any torch module does. Unlike in a
    live model, a graft whose output is not finite is not contained.

    Args:
        model: The grown model; left as it is.

    Returns:
        A copy of the host in which each slot with grafts has a child ``grafts``. Outputs agree
        with the model's to rounding (1e-5 in float32).

    Raises:
        ValueError: If a module with grafts already has a child or attribute of that name, or
            returns something that a graph cannot rebuild (anything but tensors, tuples, lists and
            dicts).
    """
    twin = copy.deepcopy(model)
    grafted = [layer for layer in twin.slots.values() if _live_seeds(twin, layer)]
    graphs = [(layer, _graft_graph(twin, layer)) for layer in grafted]
    modules = [(layer.module, graph) for layer, graph in graphs]
    host = unwrap(twin)
    for module, graph in modules:
        module.register_forward_hook(graph, with_kwargs=True)
        module.add_module(GRAFTS, graph)
    return host


def _live_seeds(model: MorphableModel, layer: KasminaLayer) -> list[int]:
    """Seeds of a slot that count in the output."""
    return [
        seed
        for seed in range(layer.num_seeds)
        if layer.graft(seed) is not None and model.alpha(layer.name, seed) > 0.0
    ]


def _graft_graph(model: MorphableModel, layer: KasminaLayer) -> fx.GraphModule:
    """The forward hook (module, args, kwargs, output) -> output that adds a slot's grafts."""
    if hasattr(layer.module, GRAFTS):
        raise ValueError(
            f"{layer.name}.{GRAFTS} exists already, but a hardened module needs that name for its "
            "grafts"
        )
    assert layer.output_path is not None, "a live seed's slot has run"
    root = nn.Module()
    graph = fx.Graph()
    graph.placeholder("module")
    args, kwargs, output = (graph.placeholder(name) for name in ("args", "kwargs", "output"))
    h = output
    for _, key in layer.output_path:
        h = graph.call_function(operator.getitem, (h, key))
    h = _features_last(graph, h, layer)
    x = None
    pieces: list[fx.Node] = []
    written = 0
    for seed in _live_seeds(model, layer):
        graft = layer.graft(seed)
        assert graft is not None
        begin, end = layer.bounds[seed]
        if written < begin:
            pieces.append(_columns(graph, h, written, begin))
        chunk = _columns(graph, h, begin, end)
        if graft.reads_input and x is None:
            x = _features_last(graph, _first_input(graph, layer.module, args, kwargs), layer)
        name = f"seed_{seed}"
        root.add_module(name, _function(graft))
        g = _apply(graph, name, graft.kernel, x if graft.reads_input and x is not None else chunk)
        alpha = model.alpha(layer.name, seed)
        if alpha != 1.0:
            g = graph.call_function(operator.mul, (g, alpha))
        pieces.append(graph.call_function(operator.add, (chunk, g)))
        written = end
    assert layer.width is not None
    if written < layer.width:
        pieces.append(_columns(graph, h, written, layer.width))
    y = graph.call_function(torch.cat, (pieces,), {"dim": -1})
    if layer.channel_axis is not None:
        y = graph.call_method("movedim", (y, -1, layer.channel_axis))
    graph.output(_rebuild(graph, output, layer.output_path, y, layer.name))
    return fx.GraphModule(root, graph)


def _columns(graph: fx.Graph, h: fx.Node, begin: int, end: int) -> fx.Node:
    return graph.call_method("narrow", (h, -1, begin, end - begin))


def _features_last(graph: fx.Graph, tensor: fx.Node, layer: KasminaLayer) -> fx.Node:
    if layer.channel_axis is None:
        return tensor
    return graph.call_method("movedim", (tensor, layer.channel_axis, -1))


def _first_input(graph: fx.Graph, module: nn.Module, args: fx.Node, kwargs: fx.Node) -> fx.Node:
    """The module's first input, given by position or by keyword.

    `(args[:1] + (kwargs.get(name),))[0]` decides that without a branch, so that the graph stays
    traceable.
    """
    name = next(iter(inspect.signature(module.forward).parameters))
    by_position = graph.call_function(operator.getitem, (args, slice(None, 1)))
    by_keyword = graph.call_method("get", (kwargs, name))
    candidates = graph.call_function(operator.add, (by_position, (by_keyword,)))
    return graph.call_function(operator.getitem, (candidates, 0))


def _function(graft: Graft) -> fx.GraphModule:
    """A graft's function as plain torch operators, with the graft's parameters."""
    names = [spec.name for spec in graft.kernel.parameters]
    weights = dict(zip(names, graft.ordered_parameters(), strict=True))
    kernel = kernel_pb2.Kernel()
    kernel.CopyFrom(graft.kernel)
    if kernel.WhichOneof("lowering") != "graph":
        # The native families work on features wherever they are, and get them last here.
        kernel.signature.slot_kind = kernel_pb2.SLOT_KIND_LINEAR
    # In eval mode: a graph holds the mode that it was traced in, and dropout noise would stay.
    return fx.symbolic_trace(reference_module(kernel, weights).eval())


def _apply(graph: fx.Graph, name: str, kernel: kernel_pb2.Kernel, source: fx.Node) -> fx.Node:
    """Calls a graft's function in the layout that its kernel was made for; features last again."""
    planes = (
        kernel.WhichOneof("lowering") == "graph" and kernel.signature.slot_kind in CHANNEL_KINDS
    )
    if planes:
        source = graph.call_method("movedim", (source, -1, 1))
    g = graph.call_module(name, (source,))
    return graph.call_method("movedim", (g, 1, -1)) if planes else g


def _rebuild(
    graph: fx.Graph, output: fx.Node, path: Sequence[tuple[str, int | str]], y: fx.Node, slot: str
) -> fx.Node:
    """What the module returned, with the slot's tensor replaced by ``y``."""
    if not path:
        return y
    (container, key), rest = path[0], path[1:]
    inner = _rebuild(graph, graph.call_function(operator.getitem, (output, key)), rest, y, slot)
    if container == "dict" and isinstance(key, str):
        return graph.call_function(operator.or_, (output, {key: inner}))
    if container not in ("tuple", "list") or not isinstance(key, int):
        raise ValueError(
            f"slot {slot!r} returns a {container}, but only a module that returns tensors, tuples, "
            "lists and dicts with words as keys can be hardened"
        )
    before = graph.call_function(operator.getitem, (output, slice(None, key)))
    after = graph.call_function(operator.getitem, (output, slice(key + 1, None)))
    item = (inner,) if container == "tuple" else [inner]
    return graph.call_function(
        operator.add, (graph.call_function(operator.add, (before, item)), after)
    )
