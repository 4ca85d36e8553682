"""Where a model can grow, found by following its data: what ``target_layers="auto"`` offers.

Three sorts of places are found, in the order of preference:

* *Bridges*: a Linear or convolution whose result reaches another one of its sort through norms,
  dropout and at least one activation, gates (``act(a(x)) * b(x)``) included. Seeds read the first
  module's input and add to the second one's output, so that a bottleneck there widens what lies
  between the two. Convolutions must keep the size of the image: a seed works position by position.
* *Residual blocks*, modules whose result is a sum, and recurrent layers. Seeds read the output and
  add to it: more depth.
* *Single layers*: a Linear or convolution that an activation follows and that is in no bridge.

A pair is left out where its modules are called in another pattern than in turns, because a seed
could not tell then which input belongs to which output.
"""

import re
from collections.abc import Iterable
from collections.abc import Sequence

from torch import nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from esper.kasmina.sites import Bridge
from esper.kasmina.sites import keeps_size
from esper.kasmina.tracing import Flow
from esper.kasmina.tracing import Inputs
from esper.kasmina.tracing import Step
from esper.kasmina.tracing import recorded
from esper.kasmina.tracing import traced

_ACTIVATIONS = tuple(
    kind
    for kind in vars(activation).values()
    if isinstance(kind, type)
    and issubclass(kind, nn.Module)
    and kind.__module__ == activation.__name__
    and kind is not nn.MultiheadAttention
)
_ACTIVATION_NAMES = frozenset(
    re.findall(
        r"\w+",
        "celu elu gelu glu hardsigmoid hardswish hardtanh leaky_relu mish prelu relu relu6 rrelu "
        "selu sigmoid silu softplus softsign swish tanh tanhshrink",
    )
)
_SHAPELESS = (
    _DropoutNd,
    _NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.Identity,
)
_SHAPELESS_NAMES = frozenset(
    re.findall(
        r"\w+",
        "alpha_dropout batch_norm contiguous dropout dropout1d dropout2d dropout3d feature_dropout "
        "group_norm instance_norm layer_norm rms_norm",
    )
)
_SUMS = frozenset({"add", "iadd", "radd"})
_PRODUCTS = frozenset({"mul", "imul", "rmul"})


def find_places(host: nn.Module, example_inputs: Inputs | None) -> list[Bridge | str]:
    """Returns the places where a model can grow: bridges, and FQNs of single modules.

    Args:
        host: The model; neither changed nor, without example inputs, run.
        example_inputs: What a copy of the model is run on, to see what cannot be traced.

    Raises:
        ValueError: If the model cannot be copied.
    """
    modules = dict(host.named_modules())
    flows = traced(host) if example_inputs is None else recorded(host, example_inputs)
    bridges: dict[str, Bridge] = {}
    blocks: dict[str, None] = {}
    layers: dict[str, None] = {}
    for flow in flows:
        for bridge in _bridges(flow, modules):
            bridges.setdefault(bridge.last, bridge)
        blocks.update(dict.fromkeys(_residual_blocks(flow, modules)))
        for step in flow.steps:
            if isinstance(modules.get(step.name), nn.RNNBase):
                blocks[step.name] = None
            if _is_activation(step, modules) and step.inputs:
                layers.update(dict.fromkeys(s.name for s in _origins(step.inputs[0], modules)))
    bridged = {name for bridge in bridges.values() for name in (bridge.first, bridge.last)}
    return [*bridges.values(), *blocks, *(name for name in layers if name not in bridged)]


def _bridges(flow: Flow, modules: dict[str, nn.Module]) -> Iterable[Bridge]:
    order = {step: position for position, step in enumerate(flow.steps)}
    pairs: dict[str, list[tuple[Step | None, Step]]] = {}
    calls: dict[str, list[Step]] = {}
    for step in flow.steps:
        if _is_layer(step, modules):
            calls.setdefault(step.name, []).append(step)
            pairs.setdefault(step.name, []).append((_partner(step, modules, order), step))
    for last, found in pairs.items():
        firsts = {first.name for first, _ in found if first is not None}
        if len(firsts) != 1 or any(first is None for first, _ in found):
            continue
        (name,) = firsts
        turns = [order[step] for pair in found for step in pair if step is not None]
        if turns == sorted(turns) and [first for first, _ in found] == calls[name]:
            yield Bridge(name, last)


def _partner(last: Step, modules: dict[str, nn.Module], order: dict[Step, int]) -> Step | None:
    """The layer that starts the bridge which ends in a layer's call; None where there is none."""
    if not last.inputs or not _reaches_activation(last.inputs[0], modules):
        return None
    origins = _origins(last.inputs[0], modules)
    if not origins:
        return None
    first = min(origins, key=order.__getitem__)
    if any(origin.inputs != first.inputs for origin in origins) or first.name == last.name:
        return None
    return first if _same_tokens(modules[first.name], modules[last.name]) else None


def _origins(step: Step, modules: dict[str, nn.Module]) -> list[Step]:
    """The layers whose results a step is made of; none if anything else is in it."""
    if _is_layer(step, modules):
        return [step]
    if step.function in _PRODUCTS and len(step.inputs) == 2:
        sides = [_origins(side, modules) for side in step.inputs]
        return sides[0] + sides[1] if all(sides) else []
    return _origins(step.inputs[0], modules) if _keeps_shape(step, modules) else []


def _reaches_activation(step: Step, modules: dict[str, nn.Module]) -> bool:
    if _is_activation(step, modules):
        return True
    through = _keeps_shape(step, modules) or step.function in _PRODUCTS
    return through and any(_reaches_activation(source, modules) for source in step.inputs)


def _residual_blocks(flow: Flow, modules: dict[str, nn.Module]) -> Iterable[str]:
    """Innermost modules that return a sum, norms and activations after it apart."""
    seen: set[Step] = set()
    for name, step in flow.blocks:
        while _keeps_shape(step, modules):
            step = step.inputs[0]
        is_sum = step.function in _SUMS and len(step.inputs) == 2
        if name and is_sum and step not in seen:
            seen.add(step)
            yield name


def _is_layer(step: Step, modules: dict[str, nn.Module]) -> bool:
    return bool(step.name) and isinstance(modules[step.name], nn.Linear | _ConvNd)


def _is_activation(step: Step, modules: dict[str, nn.Module]) -> bool:
    if step.name:
        return isinstance(modules[step.name], _ACTIVATIONS)
    return step.function in _ACTIVATION_NAMES


def _keeps_shape(step: Step, modules: dict[str, nn.Module]) -> bool:
    """Whether a step works on its first input alone, position by position or normalizing it."""
    if not step.inputs:
        return False
    if step.name and isinstance(modules[step.name], _SHAPELESS):
        return True
    return _is_activation(step, modules) or step.function in _SHAPELESS_NAMES


def _same_tokens(first: nn.Module, last: nn.Module) -> bool:
    """Whether every position of the last layer's output has one of the first layer's input."""
    layers: Sequence[nn.Module] = (first, last)
    if all(isinstance(layer, nn.Linear) for layer in layers):
        return True
    convolutions = [layer for layer in layers if isinstance(layer, _ConvNd)]
    return (
        len(convolutions) == 2
        and len(convolutions[0].kernel_size) == len(convolutions[1].kernel_size)
        and all(keeps_size(layer) for layer in convolutions)
    )
