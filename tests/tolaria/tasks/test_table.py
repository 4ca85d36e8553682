"""The table is fixed, and rewards size up to a point."""

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from esper.tolaria import tasks
from esper.tolaria.tasks.table import table


def test_the_table_is_the_same_every_time_and_scaled_by_its_training_rows() -> None:
    task, again = tasks.get("table"), table()
    assert torch.equal(task.train.inputs, again.train.inputs)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [3000, 1000, 1000]
    assert task.train.inputs.mean(dim=0).abs().max() < 1e-5
    assert (task.train.inputs.std(dim=0) - 1).abs().max() < 1e-5
    assert set(task.train.targets.tolist()) == set(range(6))


def test_hidden_units_pay() -> None:
    task = tasks.get("table")
    rows, labels = task.train.inputs.numpy(), task.train.targets.numpy()
    held_out = task.validation.inputs.numpy(), task.validation.targets.numpy()
    linear = LogisticRegression(max_iter=500).fit(rows, labels).score(*held_out)
    wide = MLPClassifier(64, max_iter=30, early_stopping=True, random_state=0)
    wide = wide.fit(rows, labels).score(*held_out)
    assert wide > linear + 0.1
