"""Making a model morphable, and giving the model back."""

from collections.abc import Sequence

from torch import nn

from esper.kasmina.comparison import Original
from esper.kasmina.model import MorphableModel
from esper.kasmina.sites import Target
from esper.kasmina.sites import find_sites
from esper.kasmina.slotted import is_wrapped


def wrap(
    model: nn.Module,
    target_layers: Sequence[Target] | Target | None = None,
    seeds_per_layer: int = 4,
    cache_size_mb: int = 128,
    telemetry_enabled: bool = True,
    preserve_original: bool = True,
) -> MorphableModel:
    """Gives a model slots in which seeds can grow; the model itself stays as it is.

    No module of the model changes its class, parameters, type, ``requires_grad`` or name, and none
    gets a hook before a seed computes in it. No random generator is drawn from.

    Args:
        model: Any model.
        target_layers: Where slots go: module types, FQNs and globs over FQNs in any mix. Default:
            every Linear, Conv1d, Conv2d, MultiheadAttention, LayerNorm, BatchNorm1d, BatchNorm2d
            and Embedding that is called as a module.
        seeds_per_layer: Seeds of each slot; each owns a part of the slot's features.
        cache_size_mb: Most kernels to keep for reuse, in units of 2**20 bytes.
        telemetry_enabled: Whether to sample telemetry in training.
        preserve_original: Whether to keep a copy of the model for ``compare_with_original``.

    Returns:
        The wrapped model.

    Raises:
        ValueError: If a target matches nothing, a slot has fewer features than seeds, an argument
            is out of bounds, or the model is wrapped already; nothing has changed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, but it must be a torch.nn.Module")
    if seeds_per_layer < 1:
        raise ValueError(f"seeds_per_layer is {seeds_per_layer}, but it must be at least 1")
    if cache_size_mb < 0:
        raise ValueError(f"cache_size_mb is {cache_size_mb}, but it must be at least 0")
    for module in model.modules():
        if isinstance(module, MorphableModel) or is_wrapped(module):
            raise ValueError(
                f"model ({type(model).__name__}) is wrapped already; esper.unwrap gives it back"
            )
    sites = find_sites(model, target_layers)
    original = Original(model) if preserve_original else None
    return MorphableModel(
        model, sites, seeds_per_layer, telemetry_enabled, original, cache_size_mb * 2**20
    )


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
