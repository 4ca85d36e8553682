"""The configuration file of a run: YAML, read strictly."""

import difflib
import io
import operator
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from dataclasses import is_dataclass
from functools import cache
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Literal
from typing import get_args
from typing import get_type_hints

import cattrs
import torch
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler

from esper.config import EsperConfig
from esper.config import Hyperparameter
from esper.tolaria import tasks

Option = bool | int | float | str | tuple[float, ...] | None
"""An argument of an optimizer or scheduler."""

Place = tuple[str | int, ...]


class ConfigError(ValueError):
    """A configuration that breaks a rule; the message has file, line and key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """The model that growth starts from.

    Attributes:
        size: Width of the task's host; ``None`` is the task's own default.
        target_layers: Modules that get slots, as for ``esper.wrap``; ``auto`` finds places.
        seeds_per_layer: Seeds of every slot; at least 1.
    """

    size: int | None = None
    target_layers: Literal["auto"] | tuple[str, ...] = "auto"
    seeds_per_layer: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How it is trained.

    Attributes:
        name: Class of ``torch.optim``.
        learning_rate: Above 0.
        options: Further arguments of the class.
        scheduler: Class of ``torch.optim.lr_scheduler``, stepped after every epoch;
            ``ReduceLROnPlateau`` goes by the held-out loss. ``None`` holds the learning rate.
        scheduler_options: Arguments of that class.
    """

    name: str = "Adam"
    learning_rate: float = 0.01
    options: Mapping[str, Option] = field(default_factory=dict)
    scheduler: str | None = None
    scheduler_options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = getattr(torch.optim, self.name, None)
        if not (isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer):
            raise ValueError(f"name is {self.name!r}, but torch.optim has none of that name")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate!r}, but it must be above 0")
        scheduler = None if self.scheduler is None else getattr(lr_scheduler, self.scheduler, None)
        known = isinstance(scheduler, type) and issubclass(scheduler, lr_scheduler.LRScheduler)
        if self.scheduler is not None and not known:
            raise ValueError(
                f"scheduler is {self.scheduler!r}, but torch.optim.lr_scheduler has none of that "
                "name"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept to go on from.

    Attributes:
        keep_last: Checkpoints kept of the newest; at least 1.
        keep_best: Whether the one with the lowest held-out loss is kept besides.
        every_steps: Every how many optimizer steps one is written, besides every epoch's end.
    """

    keep_last: int = 2
    keep_best: bool = True
    every_steps: int | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last is {self.keep_last}, but it must be at least 1")
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"every_steps is {self.every_steps}, but it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that ``esper train`` is told.

    Attributes:
        task: Name of a task, see ``esper.tolaria.tasks.names()``.
        data: Folder of the task's files, for tasks whose data does not come with Esper.
        epochs: Length of the run; at least 1.
        seed: Seed of initial weights, batches and growth.
        mode: ``lockstep`` or ``async``, see ``esper.session``.
        grow: Whether seeds may germinate; ``false`` trains the host as it is, as a control.
        host: The model that growth starts from.
        optimizer: How it is trained.
        growth: How it grows.
        checkpoints: What is kept to go on from.
    """

    task: str
    data: str | None = None
    epochs: int = 30
    seed: int = 0
    mode: Literal["async", "lockstep"] = "lockstep"
    grow: bool = True
    host: HostConfig = field(default_factory=HostConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    growth: EsperConfig = field(default_factory=EsperConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.task not in tasks.names():
            raise ValueError(
                f"task is {self.task!r}, but it must be one of {', '.join(tasks.names())}"
            )
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}, but it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but it must be at least 0")

    def load_task(self) -> tasks.Task:
        """Returns the task with its data.

        Raises:
            ValueError: If `data` does not fit the task.
            OSError: If a file cannot be read.
        """
        return tasks.get(self.task, None if self.data is None else Path(self.data))

    def build_host(self, task: tasks.Task) -> nn.Module:
        """Returns a new host as training starts from; equal configurations give equal weights."""
        return task.host(self.seed, self.host.size)


def read_config(path: Path) -> RunConfig:
    """Reads a configuration file.

    Args:
        path: A YAML 1.2 file; relative folders in it are taken from the working directory.

    Raises:
        ConfigError: For YAML that is none, a key that is unknown or given twice, a value of another
            type, or one that breaks a rule; with file and line.
        OSError: If the file cannot be read.
    """
    return parse_config(path.read_text(encoding="utf-8"), str(path))


def parse_config(text: str, name: str) -> RunConfig:
    """Reads a configuration from the text of a file; see ``read_config``.

    Args:
        text: The YAML.
        name: What to call it in errors.
    """
    try:
        document = YAML(typ="rt").load(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise ConfigError(f"{name}:{line}: {error.problem or error.context}") from error
    if not isinstance(document, CommentedMap):
        raise ConfigError(f"{name}:1: a configuration is a mapping of keys, such as `task: digits`")
    for place, problem in _unknown_keys(RunConfig, document, ()):
        raise ConfigError(f"{name}:{_line(document, place)}: {problem}")
    try:
        return _converter().structure(document, RunConfig)
    except (cattrs.BaseValidationError, ValueError, TypeError, KeyError) as error:
        place, problem = next(_problems(error, ()))
        word = problem.partition(" is ")[0]
        line = _line(document, (*place, word))
        key = ".".join(map(str, place))
        raise ConfigError(f"{name}:{line}: {f'{key}: ' if key else ''}{problem}") from error


def dump_config(config: RunConfig) -> str:
    """Returns a configuration as YAML that ``parse_config`` reads back, defaults included."""
    yaml = YAML(typ="rt")
    yaml.default_flow_style = False
    stream = io.StringIO()
    yaml.dump(_plain(config), stream)
    return stream.getvalue()


def flat_config(config: RunConfig) -> dict[str, object]:
    """Returns a configuration as names with dots and their values, defaults included."""
    return dict(_flat("", _plain(config)))


def _flat(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else key, inner)
    else:
        yield name, value


def _plain(value: object) -> object:
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _unknown_keys(kind: type, value: object, place: Place) -> Iterator[tuple[Place, str]]:
    if not isinstance(value, CommentedMap):
        return
    known = {one.name for one in fields(kind)}
    hints = get_type_hints(kind)
    for key, inner in value.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            others = f", known are {', '.join(sorted(known))}"
            hint = f": did you mean {near[0]}?" if near else others
            yield (*place, key), f"{'.'.join(map(str, (*place, key)))} is unknown{hint}"
            continue
        inner_kind = hints[key]
        if isinstance(inner_kind, type) and is_dataclass(inner_kind):
            yield from _unknown_keys(inner_kind, inner, (*place, key))
        elif isinstance(inner, CommentedSeq):
            for one in get_args(inner_kind):
                if isinstance(one, type) and is_dataclass(one):
                    for number, item in enumerate(inner):
                        yield from _unknown_keys(one, item, (*place, key, number))


def _line(document: object, place: Place) -> int:
    """Returns the line of the innermost part of a place that the file has."""
    line = 1
    for key in place:
        if isinstance(document, CommentedMap) and key in document:
            line = document.lc.key(key)[0] + 1
        elif isinstance(document, CommentedSeq) and isinstance(key, int):
            line = document.lc.item(key)[0] + 1
        else:
            break
        document = document[key]
    return line


def _problems(error: BaseException, place: Place) -> Iterator[tuple[Place, str]]:
    if not isinstance(error, cattrs.BaseValidationError):
        if isinstance(error, KeyError):  # the place is that of the missing key itself
            yield place[:-1], f"{error.args[0]} is missing"
        else:
            yield place, str(error)
        return
    for inner in error.exceptions:
        for note in getattr(inner, "__notes__", ()):
            if isinstance(note, cattrs.AttributeValidationNote):
                yield from _problems(inner, (*place, note.name))
            elif isinstance(note, cattrs.IterableValidationNote):
                yield from _problems(inner, (*place, note.index))
        yield from _problems(inner, place)


@cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, allowed in {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.items():

        def strict(
            value: object, _: type, kind: type = kind, allowed: tuple[type, ...] = allowed
        ) -> object:
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{value!r} must be of type {kind.__name__}")
            return kind(value)

        converter.register_structure_hook(kind, strict)
    for union in (Option, Hyperparameter, int | None, str | None):
        kinds = get_args(union)

        def one_of(value: object, _: object, kinds: tuple[type, ...] = kinds) -> object:
            if isinstance(value, CommentedSeq) and any(kind not in _PLAIN for kind in kinds):
                return tuple(float(item) for item in value)
            for plain in _PLAIN:  # ruamel's numbers are subclasses that know how they were written
                if plain in kinds and isinstance(value, plain):
                    return None if value is None else plain(value)
            named = " or ".join(kind.__name__ for kind in kinds if kind in _PLAIN)
            raise TypeError(f"{value!r} must be of type {named}")

        converter.register_structure_hook_func(partial(operator.eq, union), one_of)

    def layers(value: object, _: object) -> object:
        if isinstance(value, CommentedSeq) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if value == "auto":
            return "auto"
        raise TypeError(f"{value!r} must be 'auto' or a list of names")

    wanted = HostConfig.__dataclass_fields__["target_layers"].type
    converter.register_structure_hook_func(partial(operator.eq, wanted), layers)
    return converter


_PLAIN: tuple[type, ...] = (NoneType, bool, int, float, str)
