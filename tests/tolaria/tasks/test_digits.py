"""Tasks are the ground that arms are compared on: equal arguments must give equal worlds."""

import pytest
import torch
from torch import nn

from esper.tolaria import tasks
from esper.tolaria.trainer import train_epoch


@pytest.fixture(scope="module")
def digits() -> tasks.Task:
    return tasks.get("digits")


def test_digits_are_split_60_20_20_without_overlap(digits: tasks.Task) -> None:
    from sklearn.datasets import load_digits

    sizes = [len(part) for part in (digits.train, digits.validation, digits.test)]
    assert sizes == [1078, 359, 360]
    inputs = torch.cat([part.inputs for part in (digits.train, digits.validation, digits.test)])
    original = torch.from_numpy(load_digits().images).float() / 16

    def rows(images: torch.Tensor) -> list[bytes]:
        return sorted(image.numpy().tobytes() for image in images)

    assert rows(inputs) == rows(original)
    assert inputs.shape == (1797, 8, 8)
    assert inputs.dtype == torch.float32
    assert (float(inputs.min()), float(inputs.max())) == (0.0, 1.0)


def test_every_class_has_its_share_of_every_split(digits: tasks.Task) -> None:
    for part, share in ((digits.train, 0.6), (digits.validation, 0.2), (digits.test, 0.2)):
        counts = torch.bincount(part.targets, minlength=10)
        assert counts.min() >= 174 * share - 1
        assert counts.max() <= 183 * share + 1


def test_labels_belong_to_their_images(digits: tasks.Task) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    neighbours = KNeighborsClassifier(3).fit(digits.train.inputs.flatten(1), digits.train.targets)
    assert neighbours.score(digits.test.inputs.flatten(1), digits.test.targets) > 0.95


def test_host_depends_on_its_seed_and_size_alone(digits: tasks.Task) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = digits.host(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again = digits.host(seed=3)
    other = digits.host(seed=4)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert sum(p.numel() for p in first.parameters()) == 64 * 8 + 8 + 8 * 10 + 10
    assert sum(p.numel() for p in digits.host(size=64).parameters()) == 64 * 64 + 64 + 64 * 10 + 10


@pytest.mark.parametrize("size", [0, -3])
def test_host_without_features_is_refused(digits: tasks.Task, size: int) -> None:
    with pytest.raises(ValueError, match=rf"size is {size}, but .* at least 1"):
        digits.host(size=size)


def test_training_batches_cover_the_split_in_an_order_of_seed_and_epoch(
    digits: tasks.Task,
) -> None:
    first = digits.train_batches(seed=0, epoch=0)
    assert [len(targets) for _, targets in first] == [64] * 16 + [54]
    seen = torch.cat([inputs for inputs, _ in first]).flatten(1)
    assert sorted(map(bytes, seen.numpy())) == sorted(
        map(bytes, digits.train.inputs.flatten(1).numpy())
    )
    again = digits.train_batches(seed=0, epoch=0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    for seed, epoch in ((0, 1), (1, 0)):
        other = digits.train_batches(seed=seed, epoch=epoch)
        assert not torch.equal(first[0][0], other[0][0])


def test_held_out_batches_are_the_validation_split(digits: tasks.Task) -> None:
    targets = torch.cat([targets for _, targets in digits.held_out_batches()])
    assert torch.equal(targets, digits.validation.targets)


def test_loss_is_the_cross_entropy_of_each_sample(digits: tasks.Task) -> None:
    model = digits.host()
    inputs, targets = digits.held_out_batches()[0]
    losses = digits.loss(model, (inputs, targets))
    expected = -torch.log_softmax(model(inputs), dim=-1)[torch.arange(64), targets]
    assert torch.allclose(losses, expected, atol=1e-6)


def test_accuracy_counts_right_answers_in_eval_mode(digits: tasks.Task) -> None:
    class Oracle(nn.Module):
        """Right on all but the first three samples, and wrong throughout in training mode."""

        def __init__(self, split: tasks.Split) -> None:
            super().__init__()
            self.key = {
                i.numpy().tobytes(): int(t)
                for i, t in zip(split.inputs, split.targets, strict=True)
            }
            self.wrong = {i.numpy().tobytes() for i in split.inputs[:3]}

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answers = [self.key[i.numpy().tobytes()] for i in images]
            off = [self.training or i.numpy().tobytes() in self.wrong for i in images]
            shifted = torch.tensor([(a + o) % 10 for a, o in zip(answers, off, strict=True)])
            return nn.functional.one_hot(shifted, 10).float()

    model = Oracle(digits.test).train()
    assert digits.accuracy(model, digits.test) == (360 - 3) / 360
    assert model.training


def test_the_convolutional_host_has_the_same_data_and_learns() -> None:
    task = tasks.get("digits-cnn")
    assert torch.equal(task.test.inputs, tasks.get("digits").test.inputs)
    model = task.host(seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(3):
        train_epoch(model, optimizer, task.train_batches(0, epoch), task.loss)
    assert task.accuracy(model, task.validation) > 0.7
    # Hidden channels of two blocks of 16 channels: two 1 x 1 convolutions and a bias for each.
    sizes = [sum(p.numel() for p in task.host(0, size).parameters()) for size in (4, 5)]
    assert sizes[1] - sizes[0] == 2 * (2 * 16 + 1)
