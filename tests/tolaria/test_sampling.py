"""A run that goes on in the middle of an epoch sees every sample once, whoever fetches them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset
from torch.utils.data import TensorDataset

import esper
from esper.tolaria import Checkpoints
from esper.tolaria import ResumableSampler
from esper.tolaria import Trainer
from esper.tolaria import tasks

NUM_SAMPLES = 50


class _Numbers(Dataset[int]):
    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


def _loader(sampler: ResumableSampler, workers: int = 0) -> "DataLoader[Tensor]":
    return DataLoader(_Numbers(), batch_size=8, sampler=sampler, num_workers=workers)  # type: ignore[arg-type]


def _seen(batches: list[Tensor]) -> list[int]:
    return [int(number) for batch in batches for number in batch]


def test_an_order_follows_from_seed_and_epoch_alone() -> None:
    def orders(seed: int) -> list[list[int]]:
        sampler = ResumableSampler(NUM_SAMPLES, seed=seed)
        return [_seen(list(sampler.rest_of_epoch(_loader(sampler)))) for _ in range(3)]

    torch.manual_seed(5)
    first = orders(0)
    torch.manual_seed(6)
    torch.rand(10)
    assert orders(0) == first
    everything = first + orders(1)
    assert all(sorted(order) == list(range(NUM_SAMPLES)) for order in everything)
    assert len({tuple(order) for order in everything}) == 6
    sampler = ResumableSampler(NUM_SAMPLES)
    sampler.set_epoch(2)
    assert list(sampler) == first[2]
    assert list(ResumableSampler(4, shuffle=False)) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 3, 7], ids=["none", "some", "all"])
def test_what_the_loop_was_given_counts_and_not_what_was_fetched(taken: int, workers: int) -> None:
    whole = ResumableSampler(NUM_SAMPLES, seed=3)
    expected = [_seen(list(whole.rest_of_epoch(_loader(whole)))) for _ in range(2)]
    sampler = ResumableSampler(NUM_SAMPLES, seed=3)
    batches = sampler.rest_of_epoch(_loader(sampler, workers))
    before = [next(batches) for _ in range(taken)]
    state = sampler.state_dict()
    del batches  # the workers have fetched more by now
    resumed = ResumableSampler(NUM_SAMPLES, seed=3)
    resumed.load_state_dict(state)
    loader = _loader(resumed, workers)
    assert len(loader) == 7 - taken
    after = list(resumed.rest_of_epoch(loader))
    assert _seen(before + after) == expected[0]
    assert _seen(list(resumed.rest_of_epoch(loader))) == expected[1]


def test_torchdata_s_loader_finds_the_place_by_itself() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> "DataLoader[Tensor]":
        sampler = ResumableSampler(NUM_SAMPLES, seed=3)
        return stateful.StatefulDataLoader(  # type: ignore[no-any-return]
            _Numbers(), batch_size=8, sampler=sampler, num_workers=2
        )

    expected = _seen(list(loader()))
    first = loader()
    batches = iter(first)
    before = [next(batches) for _ in range(3)]
    state = first.state_dict()  # type: ignore[attr-defined]
    second = loader()
    second.load_state_dict(state)  # type: ignore[attr-defined]
    assert _seen(before + list(second)) == expected


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="num_samples is 0"):
        ResumableSampler(0)
    with pytest.raises(ValueError, match="seed is -1"):
        ResumableSampler(1, seed=-1)
    sampler = ResumableSampler(NUM_SAMPLES)
    with pytest.raises(ValueError, match="another sampler"):
        sampler.rest_of_epoch(_loader(ResumableSampler(NUM_SAMPLES)))


class _Torn(Exception):
    """Ends a run in the middle."""


def test_a_trainer_goes_on_within_an_epoch_and_loads_nothing_twice(tmp_path: Path) -> None:
    task = tasks.get("digits")
    loaded: list[int] = []

    class Counted(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            loaded.append(index)
            return super().__getitem__(index)

    data = Counted(task.train.inputs[:200], task.train.targets[:200])

    def run(folder: Path, tear_at: int | None) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = esper.wrap(task.host(0), target_layers=["net"], seeds_per_layer=2)
        steps: list[int] = []

        def loss(module: torch.nn.Module, batch: object) -> Tensor:
            if module.training:
                steps.append(0)
                if len(steps) == tear_at:
                    raise _Torn
            return task.loss(module, batch)

        Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            train=DataLoader(data, batch_size=20, sampler=ResumableSampler(200, seed=2)),
            held_out=task.held_out_batches(),
            loss=loss,
            epochs=2,
            plane="unix:/nonexistent/plane.sock",
            checkpoints=Checkpoints(folder),
            save_every_steps=3,
            resume=True,
        ).fit()
        return dict(model.host.state_dict())

    expected = run(tmp_path / "whole", None)
    loaded.clear()
    # The loss is called twice in training mode before the first step, to count what a step costs.
    with pytest.raises(_Torn):
        run(tmp_path / "torn", 18)
    first = len(loaded)
    found = run(tmp_path / "torn", None)
    assert first % 20 == 0 and 200 < first < 400
    # From the last checkpoint, at a multiple of 3 steps, to the end.
    assert len(loaded) - first == 400 - (first // 20 - 1) // 3 * 60
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
