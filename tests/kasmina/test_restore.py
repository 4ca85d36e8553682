"""Putting the seeds of one model into another that has never run."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from esper.common.v1 import lifecycle_pb2
from esper.kasmina import SeedLifecycleState
from esper.kasmina import wrap

State = SeedLifecycleState
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def make_host():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 4))


def fresh():
    return wrap(make_host(), ["0", "1"])


@pytest.fixture
def grown():
    model = fresh()
    model(X)
    states = {
        ("0", 0): "GRAFTING",
        ("0", 2): "FOSSILIZED",
        ("1", 1): "TRAINING",
        ("1", 3): "GERMINATED",
    }
    for (slot, seed), state in states.items():
        blueprint = "norm_mlp" if seed == 2 else "bottleneck"
        model.germinate(slot, seed, blueprint, rank=2)
        for stage in range(State.TRAINING, State[state] + 1):
            model.advance(slot, seed, stage)
        for parameter in model.seed_parameters(slot, seed):
            nn.init.normal_(parameter)
    model.set_schedule("0", 0, lifecycle_pb2.AlphaSchedule(steps=10))
    for _ in range(3):
        model.tick()
    model.freeze_fossil("0", 2, True)
    model.germinate("0", 1, "lora", rank=1)
    model.unload_kernel("0", 1)
    return model


def saved(model):
    weights = {
        at: (
            model.kernel_of(*at),
            {
                spec.name: parameter.detach().clone()
                for spec, parameter in zip(
                    model.kernel_of(*at).parameters, model.seed_parameters(*at), strict=True
                )
            },
        )
        for at in model.occupied_seeds()
    }
    slots = {name: layer.slot_state() for name, layer in model.slots.items()}
    return model.bank.to_bytes(), slots, weights


def test_a_restored_model_is_the_model_that_was_saved(grown):
    model = fresh()
    seen = []
    model.observers.append(seen.append)
    model.restore(*saved(grown))
    assert seen == []
    for _ in range(12):
        assert torch.equal(model(X), grown(X))
        assert model.bank.to_bytes() == grown.bank.to_bytes()
        assert model.tick() == grown.tick()
    assert model.seed_state("0", 1) is State.DORMANT  # its embargo ended in both
    assert model.get_layer_names() == grown.get_layer_names()
    assert model.occupied_seeds() == grown.occupied_seeds()
    model(X).sum().backward()
    assert all(p.grad is None for p in model.seed_parameters("0", 2))  # still frozen
    model.advance("0", 0, "STABILIZATION")
    assert len(seen) == 2
    assert model.get_model_stats().cache.num_kernels == 3


def test_restored_weights_take_the_hosts_type(grown):
    model = wrap(make_host().double(), ["0", "1"])
    model.restore(*saved(grown))
    assert all(p.dtype == torch.float64 for p in model.parameters())
    torch.testing.assert_close(model(X.double()).float(), grown(X))


def test_a_slot_without_parameters_can_be_restored_before_it_runs():
    def block():
        return wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), "1")

    torch.manual_seed(0)
    source = block()
    source(X)
    source.germinate("1", 0, "lora", rank=2)
    target = block()
    target.host.load_state_dict(source.host.state_dict())
    target.restore(*saved(source))
    target.advance("1", 0, "TRAINING")
    assert torch.equal(target(X), source(X))


def spoil(bank, slots, grafts, how):
    if how == "missing graft":
        del grafts["0", 0]
    elif how == "extra graft":
        grafts["1", 0] = grafts["1", 1]
    elif how == "unknown slot":
        slots["2"] = slots["1"]
    elif how == "width":
        slots["1"] = dataclasses.replace(slots["1"], width=5)
    elif how == "bytes":
        bank = bank[:-3]
    elif how == "swapped":
        grafts["0", 0], grafts["1", 1] = grafts["1", 1], grafts["0", 0]
    elif how == "weights":
        grafts["0", 0][1].popitem()
    elif how == "kernel":
        grafts["0", 0][0].parameter_count += 1
    return bank, slots, grafts


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing graft", "seed 0 is GRAFTING in the bank, but grafts hold no kernel for it"),
        ("extra graft", "seed 0 is DORMANT in the bank, but grafts hold a kernel for it"),
        ("unknown slot", "slots are"),
        ("width", r"slots\['1'\].width is 5, but the model has 4"),
        ("bytes", "seed bank bytes are not usable"),
        ("swapped", "signature.chunk_width"),
        ("weights", "weights"),
        ("kernel", "kernel.parameter_count"),
    ],
)
def test_parts_that_do_not_fit_change_nothing(grown, how, message):
    model = fresh()
    before = model.bank.to_bytes()
    parts = copy.deepcopy(saved(grown))
    with pytest.raises(ValueError, match=message):
        model.restore(*spoil(*parts, how))
    assert model.bank.to_bytes() == before
    assert model.occupied_seeds() == [] and model.slots["0"].width is None
    model.restore(*saved(grown))


def test_a_model_in_use_is_not_overwritten(grown):
    model = fresh()
    model.germinate("1", 0, "lora", rank=1)
    with pytest.raises(ValueError, match="slot '1', seed 0 is GERMINATED, but it must be DORMANT"):
        model.restore(*saved(grown))


def test_a_bank_of_another_shape_is_refused(grown):
    model = wrap(make_host(), ["1"])
    with pytest.raises(ValueError, match="bank has 2 slots with 8 seeds, but the model has 1"):
        model.restore(*saved(grown))


def test_a_broken_seed_does_not_keep_the_rest_from_being_restored(grown):
    with torch.no_grad():
        grown.seed_parameters("0", 0)[0].fill_(float("nan"))
    model = fresh()
    weights = {
        at: dict(
            zip(
                [spec.name for spec in grown.kernel_of(*at).parameters],
                grown.seed_parameters(*at),
                strict=True,
            )
        )
        for at in grown.occupied_seeds()
    }
    model.restore(
        grown.bank.to_bytes(),
        {name: layer.slot_state() for name, layer in grown.slots.items()},
        {at: (grown.kernel_of(*at), tensors) for at, tensors in weights.items()},
    )
    assert torch.equal(model(X), grown(X)) and model(X).isfinite().all()
    assert model.seed_parameters("0", 0)[0].isnan().all()
