"""Held-out losses leave no trace; the accept test keeps its level and its power."""

import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset

from esper.tolaria.evaluation import paired_trial
from esper.tolaria.evaluation import sample_losses
from esper.tolaria.evaluation import trial_level


def _loss(model: nn.Module, batch: object) -> torch.Tensor:
    inputs, labels = batch  # type: ignore[misc]
    return functional.cross_entropy(model(inputs), labels, reduction="none")


def _data(num_samples: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 4, generator=generator)
    labels = torch.randint(0, 3, (num_samples,), generator=generator)
    return TensorDataset(inputs, labels)


def test_sample_losses_are_those_of_eval_mode_in_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    data = _data()
    losses = sample_losses(model, DataLoader(data, batch_size=6), _loss)
    reference = _loss(model.eval(), data.tensors)
    torch.testing.assert_close(losses, reference.double(), rtol=1e-6, atol=1e-6)


def test_sample_losses_leave_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()  # a mix of modes, as with frozen normalisation layers
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    sample_losses(model, DataLoader(_data(), batch_size=6, shuffle=True), _loss)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_when_the_loss_fails() -> None:
    model = nn.Linear(4, 3).train()

    def broken(model: nn.Module, batch: object) -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        sample_losses(model, DataLoader(_data()), broken)
    assert model.training


def test_a_loss_that_is_not_per_sample_is_refused() -> None:
    def mean(model: nn.Module, batch: object) -> torch.Tensor:
        return _loss(model, batch).mean()

    with pytest.raises(ValueError, match="one loss per sample"):
        sample_losses(nn.Linear(4, 3), DataLoader(_data()), mean)
    with pytest.raises(ValueError, match="held_out has 0 samples"):
        sample_losses(nn.Linear(4, 3), [], _loss)


def test_paired_trial_equals_scipys_paired_t_test() -> None:
    generator = torch.Generator().manual_seed(1)
    without = torch.rand(50, generator=generator, dtype=torch.float64)
    with_seed = without - 0.05 + 0.2 * torch.randn(50, generator=generator, dtype=torch.float64)
    trial = paired_trial(with_seed, without, level=0.05)
    reference = stats.ttest_rel(without.numpy(), with_seed.numpy(), alternative="greater")
    assert trial.p_value == pytest.approx(reference.pvalue, rel=1e-9)
    assert trial.gain == pytest.approx(float((without - with_seed).mean()))
    interval = stats.ttest_rel(without.numpy(), with_seed.numpy()).confidence_interval(0.95)
    assert (trial.low, trial.high) == pytest.approx((interval.low, interval.high))


def test_the_price_is_charged() -> None:
    generator = torch.Generator().manual_seed(2)
    without = torch.rand(200, generator=generator)
    with_seed = without - 0.1 + 0.05 * torch.randn(200, generator=generator)
    assert paired_trial(with_seed, without, level=0.01).accepted
    assert not paired_trial(with_seed, without, level=0.01, price=0.2).accepted


def test_useless_seeds_are_refused_at_the_stated_rate() -> None:
    generator = torch.Generator().manual_seed(3)
    kept = 0
    for _ in range(2000):
        noise = 0.1 * torch.randn(60, generator=generator)
        without = torch.rand(60, generator=generator)
        kept += paired_trial(without + noise, without, level=0.05).accepted
    assert 2000 * 0.03 < kept < 2000 * 0.07


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(bad: float) -> None:
    without = torch.linspace(0.5, 1.0, 10)
    with_seed = without - torch.linspace(0.1, 0.2, 10)
    assert paired_trial(with_seed, without, level=0.05).accepted
    with_seed[3] = bad
    assert not paired_trial(with_seed, without, level=0.05).accepted
    without = without.clone()
    without[3] = bad  # a host that explodes without the seed proves nothing either
    assert not paired_trial(without - 0.1, without, level=0.05).accepted


def test_a_seed_that_changes_nothing_is_refused() -> None:
    losses = torch.rand(10, generator=torch.Generator().manual_seed(4))
    assert not paired_trial(losses, losses, level=0.99).accepted


def test_levels_add_up_to_the_significance() -> None:
    levels = [trial_level(0.05, k) for k in range(1, 20001)]
    assert sum(levels) == pytest.approx(0.05, abs=1e-5)
    assert sum(levels) < 0.05
    assert levels == sorted(levels, reverse=True)


def test_few_runs_keep_a_useless_seed_though_passed_trials_hand_their_level_on() -> None:
    generator = torch.Generator().manual_seed(5)
    level, misled, runs = 0.2, 0, 300
    for _ in range(runs):
        failed, has_useless = 0, False
        for k in range(6):
            without = torch.rand(40, generator=generator)
            gain = 0.0 if k % 2 else 0.2
            saved = gain + 0.1 * torch.randn(40, generator=generator)
            trial = paired_trial(without - saved, without, level=trial_level(level, 1 + failed))
            failed += not trial.accepted
            has_useless |= trial.accepted and gain == 0.0
        misled += has_useless
    assert 0 < misled < level * runs


def test_shapes_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"both must be \[samples\]"):
        paired_trial(torch.rand(3), torch.rand(4), level=0.05)
    with pytest.raises(ValueError, match="at least 2"):
        paired_trial(torch.rand(1), torch.rand(1), level=0.05)
