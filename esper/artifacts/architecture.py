"""architecture.json: all of a grown model but its numbers; docs/model-format.md specifies it."""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from google.protobuf import json_format

from esper.artifacts.fields import Fields
from esper.artifacts.fields import Json
from esper.artifacts.fields import parse
from esper.artifacts.folder import ARCHITECTURE_FILE
from esper.artifacts.folder import FileDigest
from esper.artifacts.folder import ModelFolderError
from esper.blueprints.digest import kernel_digest
from esper.common.v1 import kernel_pb2
from esper.kasmina import SeedLifecycleState
from esper.kasmina import SlotState
from esper.kasmina.sites import chunk_bounds

FORMAT = "esper-model"
FORMAT_VERSION = 1


def _kind_name(kind: kernel_pb2.SlotKind) -> str:
    return kernel_pb2.SlotKind.Name(kind).removeprefix("SLOT_KIND_")


_KINDS = {
    name.removeprefix("SLOT_KIND_"): cast(kernel_pb2.SlotKind, number)
    for name, number in kernel_pb2.SlotKind.items()
    if number
}


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Shape and element type of a tensor.

    Attributes:
        shape: Outermost axis first.
        dtype: Name of the torch type without its prefix, such as ``float32``.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class SeedEntry:
    """One seed of a slot.

    Attributes:
        state: Name of its lifecycle state.
        alpha: Its blend factor; 0 where it holds no kernel.
        kernel: Digest of its kernel; empty for none.
    """

    state: str
    alpha: float
    kernel: str


@dataclass(frozen=True, slots=True)
class SlotEntry:
    """One slot.

    Attributes:
        state: What is known of its module.
        seeds: The seeds in order.
    """

    state: SlotState
    seeds: tuple[SeedEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What architecture.json says.

    Attributes:
        esper_version: The Esper that wrote it.
        host_class: Module and name of the host's class, for people.
        tensors: Parameters and persistent buffers of the host by FQN; a tied tensor stands once.
        aliases: Further FQNs of tied tensors, with the FQN that they stand under.
        slots: Slots by name, in the order of the lifecycle bank.
        kernels: Kernels of the seeds by digest.
        bank: The lifecycle bank, exact: states, schedules, embargoes.
        weights: What weights.safetensors must hold.
        history: What growth_history.jsonl must hold.
        task: Name of the task that the model belongs to, if any; its own host is the model's host.
    """

    esper_version: str
    host_class: str
    tensors: Mapping[str, TensorLayout]
    aliases: Mapping[str, str]
    slots: Mapping[str, SlotEntry]
    kernels: Mapping[str, kernel_pb2.Kernel]
    bank: bytes
    weights: FileDigest
    history: FileDigest
    task: str | None

    def to_bytes(self) -> bytes:
        """Returns the file; equal architectures give equal bytes."""
        body: dict[str, Json] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "esper_version": self.esper_version,
            "task": self.task,
            "host": {
                "class": self.host_class,
                "tensors": {
                    name: {"shape": list(layout.shape), "dtype": layout.dtype}
                    for name, layout in self.tensors.items()
                },
                "aliases": dict(self.aliases),
            },
            "slots": {name: _slot_to_json(slot) for name, slot in self.slots.items()},
            "kernels": {
                digest: json_format.MessageToDict(kernel, preserving_proto_field_name=True)
                for digest, kernel in sorted(self.kernels.items())
            },
            "lifecycle": {
                "bank": base64.b64encode(self.bank).decode("ascii"),
                "sha256": hashlib.sha256(self.bank).hexdigest(),
            },
            "files": {
                "weights": _digest_to_json(self.weights),
                "history": _digest_to_json(self.history),
            },
        }
        whole = {**body, "sha256": _body_digest(body)}
        return (json.dumps(whole, indent=2) + "\n").encode()


def from_bytes(data: bytes) -> Architecture:
    """Returns what an architecture.json says.

    Raises:
        ModelFolderError: If it is corrupt, of another format version, or breaks a rule of it.
    """
    root = parse(data, ARCHITECTURE_FILE)
    _check_format(root)
    digest = root.text("sha256")
    body = {key: value for key, value in json.loads(data).items() if key != "sha256"}
    if digest != _body_digest(body):
        raise ModelFolderError(
            f"{ARCHITECTURE_FILE}.sha256",
            digest,
            f"the other fields give {_body_digest(body)}; the file is corrupt or was edited",
        )
    host = root.fields("host")
    kernels = _kernels(root.fields("kernels"))
    files = root.fields("files")
    architecture = Architecture(
        esper_version=root.text("esper_version"),
        host_class=host.text("class"),
        tensors={name: _tensor(entry) for name, entry in host.fields("tensors").entries().items()},
        aliases=host.fields("aliases").text_entries(),
        slots={
            name: _slot(entry, kernels) for name, entry in root.fields("slots").entries().items()
        },
        kernels=kernels,
        bank=_bank(root.fields("lifecycle")),
        weights=_file(files.fields("weights")),
        history=_file(files.fields("history")),
        task=root.optional_text("task"),
    )
    for fields in (host, files, root):
        fields.finish()
    for alias, name in architecture.aliases.items():
        if name not in architecture.tensors or alias in architecture.tensors:
            raise ModelFolderError(
                f"{ARCHITECTURE_FILE}.host.aliases[{alias!r}]",
                name,
                "an alias must name a tensor of host.tensors and be none itself",
            )
    return architecture


def _check_format(root: Fields) -> None:
    name = root.text("format")
    if name != FORMAT:
        raise ModelFolderError(f"{ARCHITECTURE_FILE}.format", name, f"it must be {FORMAT!r}")
    version = root.count("format_version")
    if version != FORMAT_VERSION:
        raise ModelFolderError(
            f"{ARCHITECTURE_FILE}.format_version",
            version,
            f"this Esper reads version {FORMAT_VERSION}",
        )


def _body_digest(body: Mapping[str, Json]) -> str:
    """SHA-256 of all fields but the digest itself, as JSON without white space, in their order."""
    text = json.dumps(body, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_to_json(digest: FileDigest) -> Json:
    return {"sha256": digest.sha256, "size_bytes": digest.size_bytes}


def _file(entry: Fields) -> FileDigest:
    digest = FileDigest(entry.text("sha256"), entry.count("size_bytes"))
    entry.finish()
    return digest


def _slot_to_json(slot: SlotEntry) -> Json:
    state = slot.state
    return {
        "kind": _kind_name(state.kind),
        "width": state.width,
        "entry": state.entry,
        "source_width": state.source_width,
        "channel_axis": state.channel_axis,
        "output_path": (
            None if state.output_path is None else [list(step) for step in state.output_path]
        ),
        "chunk_widths": _chunk_widths(slot),
        "seeds": [
            {"state": seed.state, "alpha": seed.alpha, "kernel": seed.kernel} for seed in slot.seeds
        ],
    }


def _chunk_widths(slot: SlotEntry) -> list[Json]:
    if slot.state.width is None:
        return []
    return [end - begin for begin, end in chunk_bounds(slot.state.width, len(slot.seeds))]


def _slot(entry: Fields, kernels: Mapping[str, kernel_pb2.Kernel]) -> SlotEntry:
    kind = entry.text("kind")
    if kind not in _KINDS:
        raise ModelFolderError(f"{entry.path}.kind", kind, f"it must be one of {', '.join(_KINDS)}")
    seeds = tuple(_seed(seed, kernels) for seed in entry.objects("seeds"))
    if not seeds:
        raise ModelFolderError(f"{entry.path}.seeds", [], "a slot has at least 1 seed")
    slot = SlotEntry(
        state=SlotState(
            kind=_KINDS[kind],
            width=entry.optional_count("width", least=len(seeds)),
            source_width=entry.optional_count("source_width", least=1),
            channel_axis=entry.optional_count("channel_axis", least=-8),
            output_path=_output_path(entry, entry.take("output_path")),
            entry=entry.optional_text("entry"),
        ),
        seeds=seeds,
    )
    widths = entry.take("chunk_widths")
    if widths != _chunk_widths(slot):
        raise ModelFolderError(
            f"{entry.path}.chunk_widths", widths, f"width and seeds give {_chunk_widths(slot)}"
        )
    entry.finish()
    return slot


def _output_path(entry: Fields, value: Json) -> tuple[tuple[str, int | str], ...] | None:
    if value is None:
        return None
    steps: list[tuple[str, int | str]] = []
    for step in value if isinstance(value, list) else [value]:
        match step:
            case [str() as container, int() | str() as key] if not isinstance(key, bool):
                steps.append((container, key))
            case _:
                raise ModelFolderError(
                    f"{entry.path}.output_path", value, "it must be a list of [container, key]"
                )
    return tuple(steps)


def _seed(entry: Fields, kernels: Mapping[str, kernel_pb2.Kernel]) -> SeedEntry:
    seed = SeedEntry(entry.text("state"), entry.number("alpha"), entry.text("kernel"))
    entry.finish()
    if seed.state not in SeedLifecycleState.__members__:
        raise ModelFolderError(
            f"{entry.path}.state",
            seed.state,
            f"it must be one of {', '.join(SeedLifecycleState.__members__)}",
        )
    if seed.kernel and seed.kernel not in kernels:
        raise ModelFolderError(f"{entry.path}.kernel", seed.kernel, "kernels has no such digest")
    return seed


def _tensor(entry: Fields) -> TensorLayout:
    layout = TensorLayout(entry.counts("shape"), entry.text("dtype"))
    entry.finish()
    return layout


def _kernels(entries: Fields) -> dict[str, kernel_pb2.Kernel]:
    kernels: dict[str, kernel_pb2.Kernel] = {}
    for digest, entry in entries.entries().items():
        try:
            kernel = json_format.ParseDict(entry.rest(), kernel_pb2.Kernel())
        except json_format.ParseError as error:
            raise ModelFolderError(
                entry.path, "unreadable", f"it must be a Kernel message ({error})"
            ) from error
        found = kernel_digest(kernel)
        if found != digest:
            raise ModelFolderError(entry.path, found, "a kernel must stand under its own digest")
        kernels[digest] = kernel
    return kernels


def _bank(entry: Fields) -> bytes:
    try:
        bank = base64.b64decode(entry.text("bank"), validate=True)
    except binascii.Error as error:
        raise ModelFolderError(
            f"{entry.path}.bank", "unreadable", f"it must be base64 ({error})"
        ) from error
    digest = entry.text("sha256")
    found = hashlib.sha256(bank).hexdigest()
    if found != digest:
        raise ModelFolderError(f"{entry.path}.sha256", digest, f"the bank's digest is {found}")
    entry.finish()
    return bank
