"""Saving and loading grown models; docs/model-format.md specifies the folder."""

import json
import shutil
from collections.abc import Iterable
from collections.abc import Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch import distributed
from torch import nn

from esper.artifacts.architecture import Architecture
from esper.artifacts.architecture import SeedEntry
from esper.artifacts.architecture import SlotEntry
from esper.artifacts.architecture import TensorLayout
from esper.artifacts.architecture import from_bytes
from esper.artifacts.card import model_card
from esper.artifacts.folder import ARCHITECTURE_FILE
from esper.artifacts.folder import CARD_FILE
from esper.artifacts.folder import HISTORY_FILE
from esper.artifacts.folder import WEIGHTS_FILE
from esper.artifacts.folder import ModelFolderError
from esper.artifacts.folder import architecture_bytes
from esper.artifacts.folder import check_file
from esper.artifacts.folder import file_digest
from esper.artifacts.folder import write_folder
from esper.common.sharding import is_part
from esper.common.sharding import is_sharded
from esper.common.sharding import put
from esper.common.sharding import write_tensors
from esper.common.v1 import kernel_pb2
from esper.kasmina import Bridge
from esper.kasmina import KasminaLayer
from esper.kasmina import MorphableModel
from esper.kasmina import SlotState
from esper.kasmina import unwrap
from esper.kasmina.sites import find_sites
from esper.kasmina.wrapping import DEFAULT_CACHE_MB
from esper.kasmina.wrapping import check_plain


class HistoryEntry(Protocol):
    """A lifecycle event that can be written down, such as those of a session's history."""

    def to_json(self) -> Mapping[str, int | str]:
        """Returns the event as a flat object."""


def save(
    model: MorphableModel,
    path: str | PathLike[str],
    *,
    task: str | None = None,
    history: Iterable[HistoryEntry] = (),
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Writes a grown model into a folder; all of it appears at once, or nothing changes.

    Nothing in the folder is code: weights are safetensors, the rest is JSON and text. A model
    folder of that name is replaced. Where the model is sharded (``fully_shard``) all processes
    call this and see the same file system; the folder holds the whole model.

    Args:
        model: The model; its lifecycle goes on unharmed.
        path: The folder to write.
        task: Name of the task that the model belongs to, see ``esper.tolaria.tasks.names()``, so
            that `esper evaluate` can rebuild its host; None for any other model.
        history: Lifecycle events of the run, in order.
        group: The processes that hold a sharded model; None means all.

    Raises:
        ValueError: If ``model`` is not wrapped.
        ModelFolderError: If the host's state holds something other than tensors, or the folder
            cannot be written.
    """
    if not isinstance(model, MorphableModel):
        raise ValueError(
            f"model is a {type(model).__name__}, but only a wrapped model can be saved: pass what "
            "esper.wrap returned"
        )
    state, aliases = host_state(model.host)
    stored = {_host_key(name): tensor for name, tensor in state.items()}
    for slot, seed in model.occupied_seeds():
        kernel = model.kernel_of(slot, seed)
        assert kernel is not None, "an occupied seed holds a kernel"
        parameters = model.seed_parameters(slot, seed)
        for spec, parameter in zip(kernel.parameters, parameters, strict=True):
            stored[_seed_key(slot, seed, spec.name)] = parameter
    lines = [json.dumps(dict(entry.to_json())) + "\n" for entry in history]

    path = Path(path).absolute()
    sharded = is_sharded(model)
    staged = path.with_name(f".{path.name}.{WEIGHTS_FILE}")
    if sharded:
        tensors = {name: _independent(tensor) for name, tensor in stored.items()}
        write_tensors(tensors, staged, group)
        if distributed.get_rank() != 0:
            return

    def fill(folder: Path) -> None:
        if sharded:
            staged.rename(folder / WEIGHTS_FILE)
        else:
            write_tensors(
                {name: _independent(tensor) for name, tensor in stored.items()},
                folder / WEIGHTS_FILE,
            )
        (folder / HISTORY_FILE).write_text("".join(lines), encoding="utf-8")
        # safetensors lets nobody but the owner read; who may is for the umask to say.
        shutil.copymode(folder / HISTORY_FILE, folder / WEIGHTS_FILE)
        kernels: dict[str, kernel_pb2.Kernel] = {}
        architecture = Architecture(
            esper_version=version("esper-morphogen"),
            host_class=f"{type(model.host).__module__}.{type(model.host).__qualname__}",
            tensors={name: _layout(tensor) for name, tensor in state.items()},
            aliases=aliases,
            slots={name: _slot_entry(model, layer, kernels) for name, layer in model.slots.items()},
            kernels=kernels,
            bank=model.bank.to_bytes(),
            weights=file_digest(folder / WEIGHTS_FILE),
            history=file_digest(folder / HISTORY_FILE),
            task=task,
        )
        (folder / ARCHITECTURE_FILE).write_bytes(architecture.to_bytes())
        (folder / CARD_FILE).write_text(model_card(architecture), encoding="utf-8")

    write_folder(path, fill)


def read_architecture(path: str | PathLike[str]) -> Architecture:
    """Returns what a model folder says about its model, weights apart.

    Raises:
        ModelFolderError: If there is no such folder, or architecture.json is not sound.
    """
    return from_bytes(architecture_bytes(Path(path)))


def load(path: str | PathLike[str], host: nn.Module) -> MorphableModel:
    """Returns the grown model of a folder.

    The host gets the saved weights and the grafts, and computes what the saved model did, bit for
    bit; the lifecycle of every seed goes on where it stood. On any error the host is left as it
    was. The original is not kept: ``compare_with_original`` is not available.

    Args:
        path: A folder that ``save`` wrote.
        host: A model of the same structure as the saved host, not wrapped.

    Raises:
        ModelFolderError: If the folder is corrupt, truncated, of another format version, or made
            for another host. Names field, value and rule.
        ValueError: If ``host`` is wrapped.
    """
    check_plain(host)
    architecture, stored = _read(Path(path))
    targets, aliases = host_state(host)
    _check_host(architecture, targets, aliases)
    model = _build(architecture, host, stored)
    _copy_host(targets, stored)
    return model


def load_into(path: str | PathLike[str], model: MorphableModel) -> None:
    """Makes a wrapped model the grown model of a folder; its own seeds give way.

    On any error the model is left as it was.

    Args:
        path: A folder that ``save`` wrote.
        model: A wrapped model of the same host and slots.

    Raises:
        ModelFolderError: If the folder is corrupt, truncated, of another format version, or made
            for another host or other slots. Names field, value and rule.
    """
    architecture, stored = _read(Path(path))
    targets, aliases = host_state(model.host)
    _check_host(architecture, targets, aliases)
    _check_slots(architecture, list(model.slots))
    try:
        model.restore(*_seeds(architecture, stored), over=True)
    except ValueError as error:
        raise _inconsistent(error) from error
    _copy_host(targets, stored)


def _read(folder: Path) -> tuple[Architecture, dict[str, Tensor]]:
    """Returns the architecture and the tensors of a folder, all of it checked."""
    architecture = read_architecture(folder)
    check_file(folder / WEIGHTS_FILE, architecture.weights)
    check_file(folder / HISTORY_FILE, architecture.history)
    return architecture, _read_weights(folder / WEIGHTS_FILE, architecture)


def _copy_host(targets: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, target in targets.items():
            put(target, stored[_host_key(name)])


def _seeds(architecture: Architecture, stored: Mapping[str, Tensor]) -> tuple[
    bytes,
    dict[str, SlotState],
    dict[tuple[str, int], tuple[kernel_pb2.Kernel, dict[str, Tensor]]],
]:
    """Returns what ``MorphableModel.restore`` takes."""
    slots = {name: entry.state for name, entry in architecture.slots.items()}
    return architecture.bank, slots, _grafts(architecture, stored)


def _check_slots(architecture: Architecture, names: list[str]) -> None:
    if names != list(architecture.slots):
        raise ModelFolderError("host", names, f"its slots must be {list(architecture.slots)}")


def _build(
    architecture: Architecture, host: nn.Module, stored: Mapping[str, Tensor]
) -> MorphableModel:
    """Wraps the host and puts the seeds back; takes all of it off again where that fails."""
    targets = [
        name if slot.state.entry is None else Bridge(slot.state.entry, name)
        for name, slot in architecture.slots.items()
    ]
    try:
        sites = find_sites(host, targets)
    except ValueError as error:
        raise _inconsistent(error) from error
    _check_slots(architecture, [site.name for site in sites])
    try:
        model = MorphableModel(
            host,
            sites,
            [len(slot.seeds) for slot in architecture.slots.values()],
            telemetry_enabled=True,
            original=None,
            cache_bytes=DEFAULT_CACHE_MB * 2**20,
        )
    except ValueError as error:
        raise _inconsistent(error) from error
    try:
        model.restore(*_seeds(architecture, stored))
        _check_seeds(architecture, model, stored)
    except BaseException as error:
        unwrap(model)
        if isinstance(error, ValueError) and not isinstance(error, ModelFolderError):
            raise _inconsistent(error) from error
        raise
    return model


def _inconsistent(error: ValueError) -> ModelFolderError:
    return ModelFolderError(
        ARCHITECTURE_FILE, "inconsistent", f"its slots, kernels and bank must fit the host: {error}"
    )


def _grafts(
    architecture: Architecture, stored: Mapping[str, Tensor]
) -> dict[tuple[str, int], tuple[kernel_pb2.Kernel, dict[str, Tensor]]]:
    grafts: dict[tuple[str, int], tuple[kernel_pb2.Kernel, dict[str, Tensor]]] = {}
    for slot, entry in architecture.slots.items():
        for seed, planted in enumerate(entry.seeds):
            if planted.kernel:
                kernel = architecture.kernels[planted.kernel]
                names = [spec.name for spec in kernel.parameters]
                weights = {name: stored[_seed_key(slot, seed, name)] for name in names}
                grafts[slot, seed] = (kernel, weights)
    return grafts


def _check_seeds(
    architecture: Architecture, model: MorphableModel, stored: Mapping[str, Tensor]
) -> None:
    """Refuses a folder whose readable account of a seed differs from what was restored."""
    for slot, entry in architecture.slots.items():
        for seed, planted in enumerate(entry.seeds):
            field = f"{ARCHITECTURE_FILE}.slots[{slot!r}].seeds[{seed}]"
            state = model.seed_state(slot, seed).name
            if planted.state != state:
                raise ModelFolderError(f"{field}.state", planted.state, f"the bank says {state}")
            alpha = model.alpha(slot, seed)
            if planted.alpha != alpha:
                raise ModelFolderError(f"{field}.alpha", planted.alpha, f"the bank says {alpha}")
            kernel = model.kernel_of(slot, seed)
            specs = () if kernel is None else kernel.parameters
            for spec, parameter in zip(specs, model.seed_parameters(slot, seed), strict=True):
                found = stored[_seed_key(slot, seed, spec.name)].dtype
                if parameter.dtype != found:
                    raise ModelFolderError(
                        f"dtype of {_seed_key(slot, seed, spec.name)}",
                        _dtype_name(found),
                        f"the host computes in {_dtype_name(parameter.dtype)} there",
                    )


def _read_weights(path: Path, architecture: Architecture) -> dict[str, Tensor]:
    try:
        stored = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ModelFolderError(
            path.name, "unreadable", f"it must be a safetensors file ({error})"
        ) from error
    expected = {_host_key(name): layout.shape for name, layout in architecture.tensors.items()}
    for slot, entry in architecture.slots.items():
        for seed, planted in enumerate(entry.seeds):
            if planted.kernel:
                for spec in architecture.kernels[planted.kernel].parameters:
                    expected[_seed_key(slot, seed, spec.name)] = tuple(spec.shape)
    for name in sorted(expected.keys() ^ stored.keys()):
        there = "missing" if name in expected else "given"
        rule = "requires it" if name in expected else "knows no such tensor"
        raise ModelFolderError(f"{path.name}[{name!r}]", there, f"{ARCHITECTURE_FILE} {rule}")
    for name, shape in expected.items():
        if tuple(stored[name].shape) != shape:
            raise ModelFolderError(
                f"shape of {path.name}[{name!r}]",
                tuple(stored[name].shape),
                f"{ARCHITECTURE_FILE} says {shape}",
            )
    for name, layout in architecture.tensors.items():
        found = _dtype_name(stored[_host_key(name)].dtype)
        if found != layout.dtype:
            raise ModelFolderError(
                f"dtype of {path.name}[{_host_key(name)!r}]",
                found,
                f"{ARCHITECTURE_FILE} says {layout.dtype}",
            )
    return stored


def _check_host(
    architecture: Architecture, targets: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> None:
    made_for = f"the folder was made for a {architecture.host_class}"
    known = {**architecture.tensors, **architecture.aliases}
    for name in known:
        if name not in targets and name not in aliases:
            raise ModelFolderError(f"host.{name}", "missing", f"{made_for} that has it")
    for name in (*targets, *aliases):
        if name not in known:
            raise ModelFolderError(f"host.{name}", "given", f"{made_for} that does not have it")
    for name in sorted(aliases.keys() ^ architecture.aliases.keys()):
        tied = f"tied to {aliases[name]}" if name in aliases else "not tied"
        other = architecture.aliases.get(name)
        rule = f"ties it to {other}" if other else "does not tie it"
        raise ModelFolderError(f"host.{name}", tied, f"{made_for} that {rule}")
    for name, layout in architecture.tensors.items():
        found = _layout(targets[name])
        if found != layout:
            raise ModelFolderError(
                f"host.{name}",
                f"{found.dtype}{list(found.shape)}",
                f"{made_for} with {layout.dtype}{list(layout.shape)} there",
            )


def host_state(host: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns parameters and persistent buffers by FQN, tied ones once, and the others' FQNs.

    Raises:
        ModelFolderError: If the state holds something other than tensors, or one without a shape.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in host.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ModelFolderError(
                f"host.{name}", type(value).__name__, "only tensors can be saved as data"
            )
        if nn.parameter.is_lazy(value):
            raise ModelFolderError(f"host.{name}", "uninitialized", "run one forward first")
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value
    return tensors, aliases


def _independent(tensor: Tensor) -> Tensor:
    """A copy that shares no memory: safetensors refuses views of one storage."""
    if is_part(tensor):
        return tensor
    return tensor.detach().to("cpu", copy=True).contiguous()


def _layout(tensor: Tensor) -> TensorLayout:
    return TensorLayout(tuple(tensor.shape), _dtype_name(tensor.dtype))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _host_key(name: str) -> str:
    return f"host.{name}"


def _seed_key(slot: str, seed: int, parameter: str) -> str:
    return f"slots.{slot}.{seed}.{parameter}"


def _slot_entry(
    model: MorphableModel, layer: KasminaLayer, kernels: dict[str, kernel_pb2.Kernel]
) -> SlotEntry:
    seeds: list[SeedEntry] = []
    for seed in range(layer.num_seeds):
        graft = layer.graft(seed)
        digest = "" if graft is None else graft.digest
        if graft is not None:
            kernels[digest] = graft.kernel
        state = model.seed_state(layer.name, seed).name
        seeds.append(SeedEntry(state, model.alpha(layer.name, seed), digest))
    return SlotEntry(layer.slot_state(), tuple(seeds))
