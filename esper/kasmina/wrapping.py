"""Making a model morphable, and giving the model back."""

import contextlib
from collections.abc import Mapping
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import nn

from esper.kasmina.auto import find_places
from esper.kasmina.checks import check_whole
from esper.kasmina.comparison import Original
from esper.kasmina.model import MorphableModel
from esper.kasmina.modes import evaluating
from esper.kasmina.sites import Site
from esper.kasmina.sites import Target
from esper.kasmina.sites import find_sites
from esper.kasmina.slotted import is_wrapped
from esper.kasmina.tracing import Inputs

AUTO = "auto"
"""The target that finds the places by itself."""

DEFAULT_CACHE_MB = 128
MAX_SEEDS_PER_LAYER = 2**16

ExampleInputs = Tensor | Sequence[object] | Mapping[str, object]


def wrap(
    model: nn.Module,
    target_layers: Sequence[Target] | Target | None = None,
    seeds_per_layer: int = 4,
    cache_size_mb: int = DEFAULT_CACHE_MB,
    telemetry_enabled: bool = True,
    preserve_original: bool = True,
    example_inputs: ExampleInputs | None = None,
) -> MorphableModel:
    """Gives a model slots in which seeds can grow; the model itself stays as it is.

    No module of the model changes its class, parameters, type, ``requires_grad`` or name, and none
    gets a hook before a seed computes in it. No random generator is drawn from.

    Args:
        model: Any model.
        target_layers: Where slots go: module types, FQNs and globs over FQNs, and ``Bridge`` pairs
            in any mix, or ``"auto"``, which finds bridges, residual blocks and hidden layers by
            tracing the model (see ``esper.kasmina.auto``). Default: every Linear, Conv1d, Conv2d,
            MultiheadAttention, LayerNorm, BatchNorm1d, BatchNorm2d and Embedding that is called as
            a module.
        seeds_per_layer: Seeds of each slot, at most 65536; each owns a part of the slot's features.
            A slot with fewer features that was not named, but found by ``"auto"`` or the default,
            gets as many seeds as features.
        cache_size_mb: Most kernels to keep for reuse, in units of 2**20 bytes.
        telemetry_enabled: Whether to sample telemetry in training.
        preserve_original: Whether to keep a copy of the model for ``compare_with_original``.
        example_inputs: What the model takes: one tensor, a sequence of positional inputs, or a
            mapping of keyword inputs. The model is run on them once in eval mode, so that every
            slot knows its width, and ``"auto"`` sees what tracing cannot follow.

    Returns:
        The wrapped model.

    Raises:
        ValueError: If a target matches nothing, a named slot has fewer features than seeds, an
            argument is out of bounds, or the model is wrapped already; nothing has changed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, but it must be a torch.nn.Module")
    check_whole("seeds_per_layer", seeds_per_layer, 1, MAX_SEEDS_PER_LAYER)
    check_whole("cache_size_mb", cache_size_mb, 0)
    check_plain(model)
    inputs = None if example_inputs is None else _as_call(example_inputs)
    sites = _found(model, inputs) if target_layers == AUTO else find_sites(model, target_layers)
    num_seeds = [seeds_per_layer] * len(sites)
    if target_layers is None or target_layers == AUTO:  # nobody chose a layer that is too narrow
        num_seeds = [min(seeds_per_layer, site.width or seeds_per_layer) for site in sites]
    original = Original(model) if preserve_original else None
    wrapped = MorphableModel(
        model, sites, num_seeds, telemetry_enabled, original, cache_size_mb * 2**20
    )
    if inputs is not None:
        with contextlib.ExitStack() as undo:
            undo.callback(wrapped.release)
            with torch.random.fork_rng(), evaluating(wrapped):
                wrapped(*inputs[0], **inputs[1])
            undo.pop_all()
    return wrapped


def check_plain(model: nn.Module) -> None:
    """Refuses a model that has slots already or can have none.

    Raises:
        ValueError: If it, or a module of it, is wrapped or scripted.
    """
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model has a {type(module).__name__}, but what is scripted or traced cannot grow: "
                "wrap the module that it was made from"
            )
        if isinstance(module, MorphableModel) or is_wrapped(module):
            raise ValueError(
                f"model ({type(model).__name__}) is wrapped already; esper.unwrap gives it back"
            )


def _as_call(example_inputs: ExampleInputs) -> Inputs:
    if isinstance(example_inputs, Mapping):
        return (), example_inputs
    return (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs, {}


def _found(model: nn.Module, inputs: Inputs | None) -> list[Site]:
    places = find_places(model, inputs)
    if not places:
        hint = "" if inputs else ", or pass example_inputs, on which the model can be run"
        raise ValueError(
            f"target_layers is 'auto', but no place to grow was found in {type(model).__name__}; "
            f"name its layers{hint}"
        )
    return find_sites(model, places)


def unwrap(model: MorphableModel) -> nn.Module:
    """Takes the slots off and returns the host as it is now, trained, with no hook left.

    Seeds do not come along: a grown model is kept by ``esper.harden`` or ``esper.save``.

    Args:
        model: A wrapped model; it must not be used any more.

    Returns:
        The host that was given to ``wrap``.

    Raises:
        ValueError: If the model is not a wrapped one.
    """
    if not isinstance(model, MorphableModel):
        raise ValueError(f"model is a {type(model).__name__}, but it must come from esper.wrap")
    return model.release()
