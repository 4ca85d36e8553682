"""Where in a host slots can sit, and which of those places a user has asked for."""

import difflib
import fnmatch
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from esper.common.v1 import kernel_pb2

DEFAULT_TYPES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.MultiheadAttention,
    nn.LayerNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.Embedding,
)
"""Module types that become slots where the user names none."""

OutputPath = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True, slots=True)
class Bridge:
    """A target of ``wrap``: seeds read one module's input and add to another one's output.

    Attributes:
        first: FQN of the module whose input is read.
        last: FQN of the module that the slot sits on; it runs after the first one.
    """

    first: str
    last: str


Target = type[nn.Module] | str | Bridge


@dataclass(frozen=True, slots=True)
class Site:
    """A place that a slot can sit on.

    Attributes:
        name: FQN of the module in the host; the first one of a shared module.
        module: The module itself.
        kind: What sort of place it is.
        channel_axis: Axis of the output's features; None where it is the last one.
        width: Number of the output's features; None until a forward tells it.
        source_width: Number of features of the input that seeds read; None until a forward tells
            it, or where it can feed no seed because its token axes are not those of the output.
        entry: FQN and module whose input seeds read, for a bridge; None for the module's own.
    """

    name: str
    module: nn.Module
    kind: kernel_pb2.SlotKind
    channel_axis: int | None
    width: int | None
    source_width: int | None
    entry: tuple[str, nn.Module] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """What a slot has learnt of itself by its first forward.

    Attributes:
        kind: Sort of slot.
        width: Features of the output; None while unknown.
        source_width: Features of the input; None while unknown or where no seed can read it.
        channel_axis: Axis of the output's features; None where it is the last.
        output_path: Where the slot's tensor is in what its module returns: name of the container's
            type and key, from the outside in; () for a tensor; None while unknown.
        output_axes: Number of axes of the output; None while unknown.
        entry: FQN of the module whose input seeds read, for a bridge; None for the slot's own.
    """

    kind: kernel_pb2.SlotKind
    width: int | None
    source_width: int | None
    channel_axis: int | None
    output_path: OutputPath | None
    output_axes: int | None = None
    entry: str | None = None


def chunk_bounds(width: int, num_seeds: int) -> tuple[tuple[int, int], ...]:
    """Cuts features into contiguous chunks whose widths differ by at most one.

    Args:
        width: Number of features, at least ``num_seeds``.
        num_seeds: Number of chunks, at least 1.

    Returns:
        Half-open (begin, end) of each chunk; the wider chunks come first.
    """
    base, wider = divmod(width, num_seeds)
    bounds: list[tuple[int, int]] = []
    begin = 0
    for seed in range(num_seeds):
        end = begin + base + (seed < wider)
        bounds.append((begin, end))
        begin = end
    return tuple(bounds)


def find_sites(host: nn.Module, target_layers: Sequence[Target] | Target | None) -> list[Site]:
    """Returns the sites that the user's targets name, in the host's order of registration.

    Args:
        host: The user's model.
        target_layers: Module types, FQNs and globs over FQNs (``*``, ``?``, ``[...]``; a ``*``
            also crosses dots) and bridges in any mix; None takes ``DEFAULT_TYPES``. A shared
            module counts once, and as a bridge where it ends one.

    Raises:
        ValueError: If a target matches nothing, names a module that is never called, or no site is
            left.
    """
    targets = _as_targets(target_layers)
    names = {name: module for name, module in host.named_modules(remove_duplicate=False) if name}
    uncalled = _uncalled(host)
    chosen: set[nn.Module] = set()
    entries: dict[nn.Module, tuple[str, nn.Module]] = {}
    for target in targets:
        if isinstance(target, Bridge):
            first, last = (_callable(name, names, uncalled) for name in (target.first, target.last))
            if first is last:
                raise ValueError(
                    f"target_layers has {target}, but a bridge leads from one module to another"
                )
            chosen.add(last)
            entries[last] = (target.first, first)
        elif isinstance(target, str):
            chosen.update(_match_name(target, names, uncalled))
        else:
            matches = {m for m in names.values() if isinstance(m, target) and m not in uncalled}
            if not matches and target_layers is not None:
                raise ValueError(
                    f"target_layers has {target.__name__}, but no module of the model is one"
                )
            chosen.update(matches)
    sites = [
        _describe(name, module, entries.get(module))
        for name, module in host.named_modules()
        if name and module in chosen
    ]
    if not sites:
        raise ValueError(
            f"target_layers is {target_layers!r}, but {type(host).__name__} has no module below "
            "its root that a slot could sit on; name one of its modules"
        )
    return sites


def _as_targets(target_layers: Sequence[Target] | Target | None) -> tuple[Target, ...]:
    if target_layers is None:
        return DEFAULT_TYPES
    if isinstance(target_layers, str | type | Bridge):
        target_layers = (target_layers,)
    given: object = target_layers
    rule = "but it must hold module types, names or globs"
    if not isinstance(given, Iterable):
        raise ValueError(f"target_layers is {given!r}, {rule}")
    targets = tuple(target_layers)
    for target in targets:
        if isinstance(target, Bridge) or (isinstance(target, str) and target):
            continue
        if isinstance(target, type) and issubclass(target, nn.Module):
            continue
        raise ValueError(f"target_layers has {target!r}, {rule}")
    if not targets:
        raise ValueError("target_layers is empty, but it must name at least one layer")
    return targets


def _uncalled(host: nn.Module) -> set[nn.Module]:
    """Modules that hold parameters or children but whose ``forward`` nobody calls."""
    uncalled: set[nn.Module] = set()
    for module in host.modules():
        # Attention hands the weights of its projections to a functional.
        if isinstance(module, nn.MultiheadAttention):
            uncalled.update(child for child in module.modules() if child is not module)
        if type(module).forward is nn.Module.forward:  # containers such as ModuleList
            uncalled.add(module)
        if hasattr(module, "parametrizations"):
            uncalled.update(module.get_submodule("parametrizations").modules())
    return uncalled


def _match_name(
    pattern: str, names: dict[str, nn.Module], uncalled: set[nn.Module]
) -> Iterable[nn.Module]:
    matches = [
        module
        for name, module in names.items()
        if fnmatch.fnmatchcase(name, pattern) and module not in uncalled
    ]
    return matches if matches and pattern not in names else [_callable(pattern, names, uncalled)]


def _callable(name: str, names: dict[str, nn.Module], uncalled: set[nn.Module]) -> nn.Module:
    """The module of a name, if a slot in it could act."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ValueError(f"target_layers has {name!r}, but no module has such a name{hint}")
    if names[name] in uncalled:
        raise ValueError(
            f"target_layers has {name!r}, but a {type(names[name]).__name__} there is never called "
            "as a module, so a seed in it could not act"
        )
    return names[name]


def _describe(name: str, module: nn.Module, entry: tuple[str, nn.Module] | None) -> Site:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(
            f"target_layers has {name!r}, but its parameters are not initialized; run one forward "
            "of the model before it is wrapped"
        )
    kind = kernel_pb2.SLOT_KIND_BLOCK
    axis: int | None = None
    width: int | None = None
    source: int | None = None
    if isinstance(module, nn.Linear):
        kind, width, source = kernel_pb2.SLOT_KIND_LINEAR, module.out_features, module.in_features
    elif isinstance(module, _ConvNd):
        kind, width = kernel_pb2.SLOT_KIND_CONV, module.out_channels
        axis = -1 - len(module.kernel_size)  # counted from the end: inputs may be unbatched
        source = module.in_channels if keeps_size(module) else None
    elif isinstance(module, nn.MultiheadAttention):
        kind, width, source = kernel_pb2.SLOT_KIND_ATTENTION, module.embed_dim, module.embed_dim
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        kind = kernel_pb2.SLOT_KIND_NORM
        width = source = module.normalized_shape[-1]
    elif isinstance(module, _BatchNorm | _InstanceNorm):
        kind, axis = kernel_pb2.SLOT_KIND_CHANNEL_NORM, 1
        width = source = module.num_features
    elif isinstance(module, nn.GroupNorm):
        kind, axis = kernel_pb2.SLOT_KIND_CHANNEL_NORM, 1
        width = source = module.num_channels
    elif isinstance(module, nn.Embedding):
        kind, width = kernel_pb2.SLOT_KIND_EMBEDDING, module.embedding_dim
    if entry is not None:
        source = _entry_width(entry[1], module)
    return Site(name, module, kind, axis, width, source, entry)


def _entry_width(first: nn.Module, last: nn.Module) -> int | None:
    """Features that the seeds of a bridge read; None where only a forward can tell."""
    if isinstance(first, nn.Linear) and isinstance(last, nn.Linear):
        return first.in_features
    if isinstance(first, _ConvNd) and isinstance(last, _ConvNd) and keeps_size(first):
        return first.in_channels if keeps_size(last) else None
    return None


def keeps_size(conv: _ConvNd) -> bool:
    """Whether every output position of a convolution has an input position of its own."""
    if isinstance(conv, _ConvTransposeNd) or any(stride != 1 for stride in conv.stride):
        return False
    if conv.padding == "same":
        return True
    if isinstance(conv.padding, str):  # "valid"
        return all(kernel == 1 for kernel in conv.kernel_size)
    return all(
        2 * pad == dilation * (kernel - 1)
        for pad, dilation, kernel in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    )


def block_channel_axis(module: nn.Module, output_dim: int) -> int | None:
    """Returns the feature axis of a block whose output has been seen.

    Args:
        module: A module of unknown make.
        output_dim: Number of axes of its output.

    Returns:
        The channel axis where the block convolves images or sequences of that many axes and has
        no layer that works features-last; otherwise None, the last axis.
    """
    ranks = {len(m.kernel_size) for m in module.modules() if isinstance(m, _ConvNd)}
    features_last = any(
        isinstance(m, nn.LayerNorm | nn.MultiheadAttention | nn.Embedding) for m in module.modules()
    )
    return -(output_dim - 1) if output_dim - 2 in ranks and not features_last else None


def host_flops_per_token(module: nn.Module) -> int | None:
    """Returns the forward cost of a module for one token of its output, 2 per multiply-add.

    Biases and elementwise work count as zero, as ``torch.utils.flop_counter`` counts. None where
    the cost cannot be read off the module.
    """
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * module.out_features
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        window = 1
        for size in module.kernel_size:
            window *= size
        return 2 * (module.in_channels // module.groups) * window * module.out_channels
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | _BatchNorm | nn.Embedding):
        return 0
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear in its input, and free to be any such function of its size."""
    if isinstance(module, _ConvNd):
        return module.groups == 1
    return isinstance(module, nn.Linear)
