"""Checkpoints: folders from which a run goes on as if it had never stopped.

    step-0000000345/
      model/              the grown model, a model folder like any other (`esper.load` reads it)
      state.safetensors   tensors of optimizers, telemetry and random generators
      state.json          everything else
      rank-0001.*         what the second process has for itself, and so on (`RankState`)
      checkpoint.json     what it is, and the digests of all of it

Where several processes train, the first one writes what is the same in all of them. It is the same
folder whether one process trained or many, and whether the model was sharded or not: any number of
processes may go on from it. A folder appears whole or not at all, and nothing in it is code. A
folder that was torn or altered is refused before anything of it is used.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
from torch import Tensor
from torch import distributed

from esper.artifacts import ModelFolderError
from esper.artifacts import load_into
from esper.artifacts import read_architecture
from esper.artifacts import save
from esper.artifacts.fields import Json
from esper.artifacts.fields import parse
from esper.artifacts.folder import ARCHITECTURE_FILE
from esper.artifacts.folder import FileDigest
from esper.artifacts.folder import check_file
from esper.artifacts.folder import file_digest
from esper.artifacts.folder import write_folder
from esper.common.sharding import is_part
from esper.common.sharding import is_sharded
from esper.common.sharding import write_tensors
from esper.kasmina import MorphableModel
from esper.tolaria.packing import Packed
from esper.tolaria.packing import PackingError
from esper.tolaria.packing import kept
from esper.tolaria.packing import pack
from esper.tolaria.packing import unpack
from esper.tolaria.ranks import ALONE
from esper.tolaria.ranks import Ranks
from esper.tolaria.state import RankState
from esper.tolaria.state import RunRecord
from esper.tolaria.state import TrainingState
from esper.tolaria.state import of_a_newcomer

T = TypeVar("T")

_log = logging.getLogger("esper")

MANIFEST_FILE = "checkpoint.json"
STATE_FILE = "state.json"
TENSORS_FILE = "state.safetensors"
MODEL_FOLDER = "model"
FORMAT = "esper-checkpoint"
FORMAT_VERSION = 1
_SEALED = (STATE_FILE, TENSORS_FILE, f"{MODEL_FOLDER}/{ARCHITECTURE_FILE}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that has been read and found sound, the model's weights apart.

    Attributes:
        path: Its folder.
        training: What the next step follows from.
        record: What the run has come to know.
        others: What each further process has for itself, in their order.
    """

    path: Path
    training: TrainingState
    record: RunRecord
    others: Sequence[RankState] = ()

    def training_of(self, rank: int) -> TrainingState:
        """Returns what the next step follows from in one of the run's processes."""
        if rank == 0:
            return self.training
        if rank > len(self.others):
            return of_a_newcomer(self.training)
        return self.others[rank - 1].within(self.training)

    def load_model(self, model: MorphableModel) -> None:
        """Gives a wrapped model the weights and seeds of the checkpoint.

        Raises:
            ModelFolderError: If they do not fit; the model is as it was.
        """
        load_into(self.path / MODEL_FOLDER, model)


@dataclass(frozen=True, slots=True)
class _Whole:
    training: TrainingState
    record: RunRecord


@dataclass(frozen=True, slots=True)
class _Outcome:
    field: str = ""
    value: str = ""
    rule: str = ""


def write_checkpoint(
    path: str | PathLike[str],
    model: MorphableModel,
    training: TrainingState,
    record: RunRecord,
    ranks: Ranks = ALONE,
) -> None:
    """Writes a checkpoint; one of that name is replaced.

    Args:
        path: The folder to write.
        model: The model between two steps.
        training: Its training state.
        record: Its run's record.
        ranks: The processes that train; all of them call this, and see the same file system.

    Raises:
        PackingError: If a state holds something other than data.
        ModelFolderError: If the folder cannot be written.
    """
    path = Path(path).absolute()
    packed = pack(_Whole(training, record), "state")
    others = ranks.collect(RankState.of(training))[1:]
    error: ModelFolderError | None = None
    try:
        _write(path, model, packed, _Whole(training, record), others, ranks)
    except ModelFolderError as mine:
        error = mine
    outcome = ranks.broadcast(_Outcome() if error is None else _outcome_of(error))
    if error is not None:
        raise error
    if outcome != _Outcome():
        raise ModelFolderError(outcome.field, outcome.value, outcome.rule)


def _outcome_of(error: ModelFolderError) -> _Outcome:
    return _Outcome(error.field, str(error.value), error.rule)


def _write(
    path: Path,
    model: MorphableModel,
    packed: Packed,
    whole: _Whole,
    others: Sequence[RankState],
    ranks: Ranks,
) -> None:
    """Writes the parts beside the folder, sharded tensors together with the others."""
    shared = is_sharded(model)
    if not (ranks.leads or shared):
        return
    parts = path.with_name(f".{path.name}.parts")
    try:
        with _folder_of_parts(parts, ranks if shared else ALONE):
            save(model, parts / MODEL_FOLDER, history=whole.record.events, group=ranks.group)
            write_tensors(_storable(packed), parts / TENSORS_FILE, ranks.group)
            if ranks.leads:
                write_folder(path, partial(_fill, parts, packed, whole, others), mark=MANIFEST_FILE)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ModelFolderError:
    rule = f"it cannot be written: {error.strerror or error}"
    return ModelFolderError("path", str(path), rule)


@contextlib.contextmanager
def _folder_of_parts(parts: Path, ranks: Ranks) -> Iterator[None]:
    """An empty folder for the parts, made and removed by the rank that leads.

    No rank goes on before it is there: what one wrote earlier would be taken for what a writer that
    was killed has left, and removed.
    """
    made = _Outcome()
    if ranks.leads:
        try:
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
        except OSError as error:
            made = _outcome_of(_unwritable(parts, error))
    made = ranks.broadcast(made)
    if made != _Outcome():
        raise ModelFolderError(made.field, made.value, made.rule)
    try:
        yield
    finally:
        if ranks.leads:
            shutil.rmtree(parts, ignore_errors=True)


def _fill(
    parts: Path, packed: Packed, whole: _Whole, others: Sequence[RankState], folder: Path
) -> None:
    (folder / STATE_FILE).write_text(json.dumps(packed.document, allow_nan=False))
    for part in (MODEL_FOLDER, TENSORS_FILE):
        (parts / part).rename(folder / part)
    shutil.copymode(folder / STATE_FILE, folder / TENSORS_FILE)
    for rank, state in enumerate(others, start=1):
        own = pack(state, "state")
        document, tensors = _rank_files(rank)
        (folder / document).write_text(json.dumps(own.document, allow_nan=False))
        safetensors.torch.save_file(_storable(own), folder / tensors)
        shutil.copymode(folder / document, folder / tensors)
    loss = whole.record.epochs[-1].held_out_loss if whole.record.epochs else None
    body: dict[str, Json] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "run": whole.record.run,
        "epoch": whole.training.epoch,
        "step": whole.training.step,
        "held_out_loss": loss if loss is not None and math.isfinite(loss) else None,
        "num_ranks": 1 + len(others),
        "files": {name: _digest(folder / name) for name in _sealed(1 + len(others))},
    }
    manifest = {**body, "sha256": _body_digest(body)}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def _storable(packed: Packed) -> dict[str, Tensor]:
    """The tensors, in memory of the host that no two share; sharded ones stay as they are."""
    return {
        name: tensor if is_part(tensor) else kept(tensor).contiguous()
        for name, tensor in packed.tensors.items()
    }


def _rank_files(rank: int) -> tuple[str, str]:
    return f"rank-{rank:04d}.json", f"rank-{rank:04d}.safetensors"


def _sealed(num_ranks: int) -> list[str]:
    """Names of the files whose digests the manifest holds."""
    return [*_SEALED, *(name for rank in range(1, num_ranks) for name in _rank_files(rank))]


def read_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Returns a checkpoint, all of it checked but the model's weights.

    Raises:
        ModelFolderError: If it is none, of another format version, torn or altered.
    """
    folder = Path(path)
    manifest = _read_manifest(folder, check=True)
    whole = _unpacked(_Whole, folder, STATE_FILE, TENSORS_FILE)
    others = [
        _unpacked(RankState, folder, *_rank_files(rank)) for rank in range(1, manifest.num_ranks)
    ]
    return Checkpoint(folder, whole.training, whole.record, others)


def _unpacked(kind: type[T], folder: Path, document: str, tensors: str) -> T:
    try:
        loaded = safetensors.torch.load_file(folder / tensors)
        parsed = json.loads((folder / document).read_bytes())
        return unpack(kind, Packed(parsed, loaded), "state")
    except (PackingError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ModelFolderError(str(folder), "unreadable", f"its state must be ({error})") from error


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        run: Id of the run.
        epoch: The epoch that was running.
        step: Optimizer steps taken.
        held_out_loss: Held-out loss at the end of the epoch before; None where there was none.
        num_ranks: Processes that trained.
    """

    run: str
    epoch: int
    step: int
    held_out_loss: float | None
    num_ranks: int


def read_manifest(path: str | PathLike[str]) -> Manifest:
    """Returns what a checkpoint says of itself; its other files are not looked at.

    Raises:
        ModelFolderError: If it is none, or the manifest is torn or altered.
    """
    return _read_manifest(Path(path), check=False)


def _read_manifest(folder: Path, *, check: bool) -> Manifest:
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise ModelFolderError("path", str(folder), f"it is no checkpoint: it has no {file.name}")
    data = file.read_bytes()
    root = parse(data, MANIFEST_FILE)
    if (name := root.text("format")) != FORMAT:
        raise ModelFolderError(f"{MANIFEST_FILE}.format", name, f"it must be {FORMAT!r}")
    if (version := root.count("format_version")) != FORMAT_VERSION:
        raise ModelFolderError(
            f"{MANIFEST_FILE}.format_version", version, f"this Esper reads {FORMAT_VERSION}"
        )
    digest = root.text("sha256")
    body = {key: value for key, value in json.loads(data).items() if key != "sha256"}
    if digest != _body_digest(body):
        raise ModelFolderError(f"{MANIFEST_FILE}.sha256", digest, "it is torn or was altered")
    loss = root.take("held_out_loss")
    manifest = Manifest(
        root.text("run"),
        root.count("epoch"),
        root.count("step"),
        float(loss) if isinstance(loss, int | float) else None,
        root.count("num_ranks", least=1),
    )
    files = root.fields("files")
    for name in _sealed(manifest.num_ranks):
        entry = files.fields(name)
        expected = FileDigest(entry.text("sha256"), entry.count("size_bytes"))
        if check:
            check_file(folder / name, expected)
    return manifest


def _digest(path: Path) -> Json:
    digest = file_digest(path)
    return {"sha256": digest.sha256, "size_bytes": digest.size_bytes}


def _body_digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of a run in one folder, the oldest of which make room.

    Args:
        folder: Where they are; made with the first.
        keep_last: How many of the newest to keep; at least 1.
        keep_best: Whether to keep the one with the lowest held-out loss besides.

    Raises:
        ValueError: If ``keep_last`` is below 1.
    """

    def __init__(
        self, folder: str | PathLike[str], *, keep_last: int = 3, keep_best: bool = True
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but at least 1 checkpoint is kept")
        self.folder = Path(folder)
        self._keep_last = keep_last
        self._keep_best = keep_best

    def path(self, step: int) -> Path:
        """Returns where the checkpoint of a step stands."""
        return self.folder / f"step-{step:010d}"

    def paths(self) -> list[Path]:
        """Returns the checkpoints that are there, newest first, sound or not."""
        return sorted((p for p in self.folder.glob("step-*") if p.is_dir()), reverse=True)

    def latest(self) -> Checkpoint | None:
        """Returns the newest sound checkpoint, with a warning for each that is not.

        None where there is none.
        """
        for path in self.paths():
            try:
                checkpoint = read_checkpoint(path)
                _check_model(path)
            except ModelFolderError as error:
                _log.warning("esper: checkpoint %s is not used: %s", path, error)
            else:
                return checkpoint
        return None

    def prune(self) -> None:
        """Removes what is kept neither for its age nor for its loss, and what was torn off.

        Where several processes train, the first one does it for all.
        """
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
            return
        keep = set(self.paths()[: self._keep_last])
        if self._keep_best:
            keep |= set(_best(self.paths()))
        for path in self.paths():
            if path not in keep:
                (path / MANIFEST_FILE).unlink(missing_ok=True)  # from here on it is none
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(".step-*"):  # of a writer that was killed
            shutil.rmtree(path, ignore_errors=True)


def _check_model(path: Path) -> None:
    architecture = read_architecture(path / MODEL_FOLDER)
    check_file(path / MODEL_FOLDER / "weights.safetensors", architecture.weights)
    check_file(path / MODEL_FOLDER / "growth_history.jsonl", architecture.history)


def _best(paths: Iterable[Path]) -> list[Path]:
    losses: list[tuple[float, Path]] = []
    for path in paths:
        try:
            loss = read_manifest(path).held_out_loss
        except ModelFolderError:
            continue
        if loss is not None:
            losses.append((loss, path))
    return [min(losses)[1]] if losses else []
