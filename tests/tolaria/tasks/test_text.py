"""The text task predicts the characters of Python's own modules."""

import ast
import math

import pytest
import torch
from torch import nn

from esper.tolaria import tasks
from esper.tolaria.tasks.text import CharTransformer
from esper.tolaria.tasks.text import encode


@pytest.fixture(scope="module")
def text() -> tasks.Task:
    return tasks.get("text")


def _decode(numbers: torch.Tensor) -> str:
    return "".join("\n" if n == 0 else chr(int(n) + 31) for n in numbers)


def test_targets_are_the_next_characters(text: tasks.Task) -> None:
    for part in (text.train, text.validation, text.test):
        assert part.inputs.shape == part.targets.shape == (len(part), 64)
        assert torch.equal(part.inputs[:, 1:], part.targets[:, :-1])
    assert (len(text.validation), len(text.test)) == (256, 2048)


def test_windows_are_python_and_no_module_is_in_two_splits(text: tasks.Task) -> None:
    with open(ast.__file__, encoding="utf-8") as file:
        module = file.read()
    first = _decode(text.test.inputs[0])
    assert first == module[:64]
    train = {row.numpy().tobytes() for row in text.train.inputs}
    held_out = [
        row.numpy().tobytes() for row in torch.cat([text.validation.inputs, text.test.inputs])
    ]
    shared = sum(row in train for row in held_out)
    assert shared < 0.01 * len(held_out)  # rows of spaces and the like


def test_a_character_that_is_not_printable_has_its_own_number() -> None:
    assert encode("\n ~\t\u00e9").tolist() == [0, 1, 95, 96, 96]


def test_an_epoch_draws_its_own_samples(text: tasks.Task) -> None:
    def drawn(epoch: int) -> torch.Tensor:
        return torch.cat([inputs for inputs, _ in text.train_batches(0, epoch)])

    assert drawn(0).shape == (512, 64)
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_the_transformer_does_not_see_what_it_predicts() -> None:
    model = CharTransformer(8).eval()
    characters = torch.randint(0, 97, (2, 64))
    changed = characters.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 97
    with torch.no_grad():
        before, after = model(characters), model(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_loss_is_the_mean_over_a_samples_characters(text: tasks.Task) -> None:
    model = text.host()
    inputs, targets = text.held_out_batches()[0]
    expected = nn.functional.cross_entropy(
        model(inputs).flatten(0, 1), targets.flatten(), reduction="none"
    )
    losses = text.loss(model, (inputs, targets))
    assert torch.allclose(losses, expected.reshape(32, 64).mean(1), atol=1e-6)
    with torch.no_grad():
        assert abs(text.mean_loss(model, text.validation) - math.log(97)) < 0.5
    assert 0 <= text.accuracy(model, text.validation) < 0.1
