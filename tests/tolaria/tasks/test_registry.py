"""Tasks are found by name, and refused with the rule that they break."""

from pathlib import Path

import pytest

from esper.tolaria import tasks


def test_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="task is 'mnist', but it must be one of digits, "):
        tasks.get("mnist")
    assert tasks.names() == ("digits", "digits-cnn", "table", "text", "cifar10", "cifar100")


def test_a_built_in_task_takes_no_folder() -> None:
    with pytest.raises(ValueError, match="data is 'here', but the data of digits comes with Esper"):
        tasks.get("digits", Path("here"))


def test_a_task_of_a_folder_needs_one() -> None:
    with pytest.raises(ValueError, match="data is None, but cifar100 needs the folder"):
        tasks.get("cifar100")
