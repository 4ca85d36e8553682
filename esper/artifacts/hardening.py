"""From a grown model to a plain torch module that needs no Esper at run time.

The parameters of a graft become parameters of the module that the graft sits on, and a
`torch.fx.GraphModule` without state, called by torch as the module's forward hook, adds what the
grafts compute. So classes, attributes and parameter names of the host stay as they are (a container
still holds its children only, and code that reads ``layer.weight`` still can), and the result
copies, pickles, compiles and exports as any other module.

A graft of a bridge reads the input of another module. That module's pre-hook, a graph as well, lays
its input into a set that both modules hold, and the graft's hook takes it out again.
"""

import copy
import inspect
import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import fx
from torch import nn

from esper.blueprints import reference_module
from esper.blueprints.kernels import CHANNEL_KINDS
from esper.blueprints.kernels import source_axes
from esper.common.v1 import kernel_pb2
from esper.kasmina import KasminaLayer
from esper.kasmina import MorphableModel
from esper.kasmina import unwrap
from esper.kasmina.grafts import Graft


def harden(model: MorphableModel) -> nn.Module:
    """Returns a plain torch copy of a grown model that computes the same without Esper.

    Grafts whose alpha is above 0 are kept at their present alpha; all other seeds vanish. The
    parameter ``A`` of the graft in seed 2 of a module becomes the module's ``graft2_A``. The copy
    is in the training mode of the model and trains as any torch module does; dropout inside a graft
    stays off. Unlike in a live model, a graft whose output is not finite is not contained.

    Args:
        model: The grown model; left as it is.

    Returns:
        A copy of the host with the grafts in it. Outputs agree with the model's to rounding (1e-5
        in float32).

    Raises:
        ValueError: If ``model`` is not wrapped, or a module with grafts has never run, has an
            attribute of the name that a graft's parameter needs, feeds a graft from an input that
            is not its first, or returns something that a graph cannot rebuild (anything but
            tensors, tuples, lists and dicts).
    """
    if not isinstance(model, MorphableModel):
        raise ValueError(
            f"model is a {type(model).__name__}, but only a wrapped model can be hardened: pass "
            "what esper.wrap returned"
        )
    twin = copy.deepcopy(model)
    hardened = [
        (layer, _graft_hook(layer, live))
        for layer in twin.slots.values()
        if (live := _live_grafts(twin, layer))
    ]
    host = unwrap(twin)
    for layer, hook in hardened:
        # The method and not the module: torch.fx cannot trace a call of a module that is no child.
        layer.module.register_forward_hook(hook.forward, with_kwargs=True)
        if hasattr(layer.module, _carrier(layer)):
            keep = _carrier_hook(layer).forward
            layer.inlet.module.register_forward_pre_hook(keep, with_kwargs=True)
    return host


def _live_grafts(model: MorphableModel, layer: KasminaLayer) -> dict[int, tuple[Graft, float]]:
    """The grafts of a slot that count in its output, with their alpha, by seed."""
    live: dict[int, tuple[Graft, float]] = {}
    for seed in range(layer.num_seeds):
        graft, alpha = layer.graft(seed), model.alpha(layer.name, seed)
        if graft is not None and not graft.is_noop and alpha > 0.0:
            live[seed] = (graft, alpha)
    return live


def _graft_hook(layer: KasminaLayer, live: dict[int, tuple[Graft, float]]) -> fx.GraphModule:
    """Moves the grafts' parameters into the slot's module; returns the hook that applies them.

    The hook maps (module, args, kwargs, output) to the new output and reads the parameters off the
    module that it is given.
    """
    if layer.width is None or layer.output_path is None:
        raise ValueError(
            f"slot {layer.name!r} has never run, so what it returns is not known; run one forward "
            "of the model first"
        )
    if not layer.inlet.reads_first and any(graft.reads_input for graft, _ in live.values()):
        raise ValueError(
            f"slot {layer.name!r} has a graft that reads the module's input, but the first input "
            "is no floating-point tensor, and a hardened module can read no other"
        )
    graph = fx.Graph()
    module, args, kwargs, output = (
        graph.placeholder(name) for name in ("module", "args", "kwargs", "output")
    )
    h = output
    for _, key in layer.output_path:
        h = graph.call_function(operator.getitem, (h, key))
    h = _features_last(graph, h, layer)
    if not any(graft.reads_input for graft, _ in live.values()):
        x = h  # nothing reads it
    elif layer.inlet.name is None:
        x = _features_last(graph, _first_input(graph, layer.module, args, kwargs), layer)
    else:
        x = _features_last(graph, _carried(graph, layer, module), layer)
    pieces: list[fx.Node] = []
    written = 0
    for seed, (graft, alpha) in live.items():
        begin, end = layer.bounds[seed]
        if written < begin:
            pieces.append(graph.call_method("narrow", (h, -1, written, begin - written)))
        chunk = graph.call_method("narrow", (h, -1, begin, end - begin))
        names = _adopt_parameters(layer, seed, graft)
        g = _apply(graph, graft, x if graft.reads_input else chunk, module, names)
        if alpha != 1.0:
            g = graph.call_function(operator.mul, (g, alpha))
        pieces.append(graph.call_function(operator.add, (chunk, g)))
        written = end
    if written < layer.width:
        pieces.append(graph.call_method("narrow", (h, -1, written, layer.width - written)))
    y = graph.call_function(torch.cat, (pieces,), {"dim": -1})
    if layer.channel_axis is not None:
        y = graph.call_method("movedim", (y, -1, layer.channel_axis))
    graph.output(_rebuild(graph, output, layer.output_path, y, layer.name))
    return fx.GraphModule(nn.Module(), graph)


def _features_last(graph: fx.Graph, tensor: fx.Node, layer: KasminaLayer) -> fx.Node:
    if layer.channel_axis is None:
        return tensor
    return graph.call_method("movedim", (tensor, layer.channel_axis, -1))


def _first_input(graph: fx.Graph, module: nn.Module, args: fx.Node, kwargs: fx.Node) -> fx.Node:
    """The module's first input, given by position or by keyword.

    `(args[:1] + (kwargs.get(name),))[0]` decides that without a branch, so that the graph can be
    traced again.
    """
    name = next(iter(inspect.signature(module.forward).parameters), "")
    by_position = graph.call_function(operator.getitem, (args, slice(None, 1)))
    by_keyword = graph.call_method("get", (kwargs, name))
    candidates = graph.call_function(operator.add, (by_position, (by_keyword,)))
    return graph.call_function(operator.getitem, (candidates, 0))


def _carrier(layer: KasminaLayer) -> str:
    """Name of what carries a bridge's input, as an attribute of both its modules."""
    return "graft_input_" + layer.name.replace(".", "_")


def _carried(graph: fx.Graph, layer: KasminaLayer, module: fx.Node) -> fx.Node:
    """Takes the input of a bridge's first module out of where it was laid."""
    # A set: torch.export gives either module a list or dict of its own, and a graph that is pickled
    # forgets what is set on an attribute.
    name, carrier = _carrier(layer), set[Tensor]()
    for holder in (layer.inlet.module, layer.module):
        if hasattr(holder, name):
            raise ValueError(
                f"{layer.name}: {type(holder).__name__}.{name} exists already, but a hardened "
                "module needs that name to carry the input of a bridge"
            )
        setattr(holder, name, carrier)
    carrier_node = graph.call_function(getattr, (module, name))
    return graph.call_method("pop", (carrier_node,))


def _carrier_hook(layer: KasminaLayer) -> fx.GraphModule:
    """The pre-hook of a bridge's first module: lays its input down for the last."""
    graph = fx.Graph()
    module, args, kwargs = (graph.placeholder(name) for name in ("module", "args", "kwargs"))
    x = _first_input(graph, layer.inlet.module, args, kwargs)
    carrier = graph.call_function(getattr, (module, _carrier(layer)))
    graph.call_method("clear", (carrier,))
    graph.call_method("add", (carrier, x))
    graph.output(None)
    return fx.GraphModule(nn.Module(), graph)


def _adopt_parameters(layer: KasminaLayer, seed: int, graft: Graft) -> dict[str, str]:
    """Gives the slot's module the parameters of a graft; returns their new names by old name."""
    names: dict[str, str] = {}
    for spec, parameter in zip(graft.kernel.parameters, graft.ordered_parameters(), strict=True):
        names[spec.name] = f"graft{seed}_{spec.name}"
        if hasattr(layer.module, names[spec.name]):
            raise ValueError(
                f"{layer.name}.{names[spec.name]} exists already, but a hardened module needs that "
                "name for a graft's parameter"
            )
        layer.module.register_parameter(names[spec.name], parameter)
    return names


def _apply(
    graph: fx.Graph, graft: Graft, source: fx.Node, module: fx.Node, names: dict[str, str]
) -> fx.Node:
    """Writes a graft's function into the graph, in plain torch operators; features last."""
    kernel = kernel_pb2.Kernel()
    kernel.CopyFrom(graft.kernel)
    laid_out = kernel.HasField("graph") or source_axes(kernel) is not None
    planes = laid_out and kernel.signature.slot_kind in CHANNEL_KINDS
    if not laid_out:
        # A native family that knows tokens alone takes features wherever they are: last, here.
        kernel.signature.slot_kind = kernel_pb2.SLOT_KIND_LINEAR
    # In eval mode: a graph holds the mode that it was traced in, and dropout noise would stay.
    function = fx.symbolic_trace(reference_module(kernel).eval())
    if planes:
        source = graph.call_method("movedim", (source, -1, 1))
    values: dict[fx.Node, fx.Node] = {}
    g: fx.Node | None = None
    for node in function.graph.nodes:
        match node.op:
            case "placeholder":
                values[node] = source
            case "get_attr":
                values[node] = graph.call_function(getattr, (module, names[str(node.target)]))
            case "output":
                result = node.args[0]
                assert isinstance(result, fx.Node)
                g = values[result]
            case _:
                values[node] = graph.node_copy(node, values.__getitem__)
    assert g is not None, "every graph has an output"
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
