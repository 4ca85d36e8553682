"""Named tasks: data, split and host of the experiments that Esper ships."""

from collections.abc import Callable
from functools import cache
from functools import partial
from pathlib import Path

from esper.tolaria.tasks.cifar import cifar
from esper.tolaria.tasks.digits import DigitsMLP
from esper.tolaria.tasks.digits import digits
from esper.tolaria.tasks.digits import digits_cnn
from esper.tolaria.tasks.table import table
from esper.tolaria.tasks.task import LabelledBatch
from esper.tolaria.tasks.task import Split
from esper.tolaria.tasks.task import Task
from esper.tolaria.tasks.text import text

__all__ = ["DigitsMLP", "LabelledBatch", "Split", "Task", "get", "names"]

_BUILT_IN: dict[str, Callable[[], Task]] = {
    "digits": digits,
    "digits-cnn": digits_cnn,
    "table": table,
    "text": text,
}
_FROM_FOLDER: dict[str, Callable[[Path], Task]] = {
    "cifar10": partial(cifar, "cifar10"),
    "cifar100": partial(cifar, "cifar100"),
}


def names() -> tuple[str, ...]:
    """Returns the names of all tasks."""
    return (*_BUILT_IN, *_FROM_FOLDER)


@cache
def get(name: str, data: Path | None = None) -> Task:
    """Returns a task by name; its data is loaded once per process.

    Args:
        name: One of ``names()``.
        data: Folder of its files. Needed by ``cifar10`` and ``cifar100``, which nothing downloads;
            refused by the others, whose data comes with what is installed.

    Raises:
        ValueError: If there is no such task, or ``data`` does not fit it.
        OSError: If a file cannot be read.
    """
    if name not in names():
        raise ValueError(f"task is {name!r}, but it must be one of {', '.join(names())}")
    if name in _BUILT_IN:
        if data is not None:
            raise ValueError(f"data is {str(data)!r}, but the data of {name} comes with Esper")
        return _BUILT_IN[name]()
    if data is None:
        raise ValueError(f"data is None, but {name} needs the folder that holds its binary files")
    return _FROM_FOLDER[name](data)
