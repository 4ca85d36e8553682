"""The interface of a wrapped model: every move of a seed, and the model as a module."""

import copy
import gc

import pytest
import torch
from seed_host import Net
from seed_host import State
from seed_host import to_state
from torch import nn

from esper import _C
from esper.blueprints import kernel_digest
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import lifecycle_pb2
from esper.kasmina import MorphableModel
from esper.kasmina import Transition
from esper.kasmina import unwrap
from esper.kasmina import wrap

INPUT = blueprint_pb2.SEED_SOURCE_INPUT
OUTPUT = blueprint_pb2.SEED_SOURCE_OUTPUT


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wrap(Net())


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_a_wrapped_model_is_called_and_asked_like_its_host(model, x):
    host = model.host
    assert torch.equal(model(x), host(x))
    assert model.classes == ("a", "b", "c", "d")
    assert model.names_of(x) == host.names_of(x)
    assert model.body is host.body
    with pytest.raises(AttributeError, match="nowhere"):
        _ = model.nowhere
    assert not hasattr(model, "nowhere")


def test_names_and_parameters(model):
    assert model.get_layer_names() == ["body.0", "keys"]
    assert list(model.slots) == ["body.0", "keys"]
    assert dict(model.slots)["keys"] is model.slots["keys"]
    before = dict(model.named_parameters())
    assert set(before) == {f"host.{name}" for name, _ in model.host.named_parameters()}
    model.germinate("body.0", 1, "bottleneck", rank=2)
    model.germinate("keys", 0, "affine")
    added = set(dict(model.named_parameters())) - set(before)
    assert "slots.body/0.grafts.1.A" in added and "slots.keys~.grafts.0.w" in added
    parameters = model.seed_parameters("body.0", 1)
    assert [tuple(p.shape) for p in parameters][0] == (2, 2)
    assert {id(p) for p in parameters} <= {id(p) for p in model.parameters()}
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.host_parameters("body.0") == list(model.host.body[0].parameters())
    assert model.occupied_seeds() == [("body.0", 1), ("keys", 0)]


def test_tied_parameters_count_once():
    host = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    host[1].weight = host[0].weight
    assert wrap(host).num_parameters() == 16


def test_a_seed_is_walked_through_its_life(model, x):
    seen: list[Transition] = []
    model.observers.append(seen.append)
    bare = model(x).detach()
    model.germinate("body.0", 2, "widen", rank=3)
    assert model.seed_state("body.0", 2) is State.GERMINATED
    assert not model.slots["body.0"].hooked
    nn.init.normal_(model.seed_parameters("body.0", 2)[-1])
    model.advance("body.0", 2, "TRAINING", reason="step boundary")
    assert model.slots["body.0"].hooked
    assert torch.equal(model(x), bare)
    model.advance("body.0", 2, State.GRAFTING)
    model.set_schedule("body.0", 2, lifecycle_pb2.AlphaSchedule(steps=4))
    alphas = []
    completed = []
    for _ in range(5):
        completed.append(model.tick())
        alphas.append(model.alpha("body.0", 2))
    assert alphas == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert completed == [[], [], [], [("body.0", 2)], []]
    assert not torch.equal(model(x), bare)
    for state in ("STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED"):
        model.advance("body.0", 2, state)
    assert [t.after.name for t in seen] == [state.name for state in State][1:8]
    assert {t.kernel for t in seen} == {kernel_digest(model.kernel_of("body.0", 2))}
    assert seen[1] == Transition(
        "body.0", 2, State.GERMINATED, State.TRAINING, seen[0].kernel, "step boundary"
    )


def test_only_the_seeds_own_chunk_changes(model, x):
    to_state(model, "keys", 1, "FINE_TUNING")
    bare = model.host.keys.forward(model.body(x))
    grown = model(x)
    changed = (grown != bare).any(dim=0)
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("state", "trains", "is_frozen"),
    [
        ("TRAINING", True, False),
        ("GRAFTING", True, False),
        ("STABILIZATION", False, False),
        ("EVALUATING", False, False),
        ("FINE_TUNING", True, False),
        ("FOSSILIZED", True, False),
        ("FOSSILIZED", False, True),
    ],
)
@pytest.mark.parametrize("blueprint", ["bottleneck", "norm_mlp", "affine"])
def test_parameters_have_gradients_in_exactly_the_states_that_train(
    model, x, state, trains, is_frozen, blueprint
):
    hyperparameters = {} if blueprint == "affine" else {"rank": 2}
    model.germinate("body.0", 0, blueprint, **hyperparameters)
    for stage in range(State.TRAINING, State[state] + 1):
        model.advance("body.0", 0, stage)
    if state == "GRAFTING":
        model.set_seed_alpha("body.0", 0, 0.5)
    model.freeze_fossil("body.0", 0, is_frozen)
    model(x).square().sum().backward()
    gradients = [p.grad is not None for p in model.seed_parameters("body.0", 0)]
    assert all(gradients) if trains else not any(gradients)


def test_removing_a_seed_takes_its_parameters_and_its_hook(model, x):
    bare = model(x).detach()
    number = model.num_parameters()
    to_state(model, "body.0", 0, "FINE_TUNING")
    to_state(model, "body.0", 3, "TRAINING", "norm_mlp", rank=1)
    model.cull("body.0", 0, reason="useless")
    assert model.seed_state("body.0", 0) is State.CULLED
    assert model.kernel_of("body.0", 0) is None
    assert model.seed_parameters("body.0", 0) == []
    assert model.slots["body.0"].hooked  # the other seed still computes
    model.unload_kernel("body.0", 3)
    assert model.seed_state("body.0", 3) is State.CANCELLED
    assert not model.slots["body.0"].hooked
    assert not model.host.body[0]._forward_hooks
    assert model.num_parameters() == number
    assert torch.equal(model(x), bare)
    assert model.tick() == []
    assert model.seed_state("body.0", 0) is State.DORMANT
    model.germinate("body.0", 0, "lora", rank=2)


def test_rolling_back_by_advance_removes_the_seed(model):
    to_state(model, "body.0", 0, "STABILIZATION")
    model.advance("body.0", 0, "ROLLED_BACK")
    assert model.occupied_seeds() == []


def test_unloading_a_seed_that_has_acted_is_refused(model):
    to_state(model, "body.0", 0, "GRAFTING")
    with pytest.raises(ValueError, match="seed 0 is GRAFTING, but.*GERMINATED or TRAINING.*culled"):
        model.unload_kernel("body.0", 0)
    assert model.seed_state("body.0", 0) is State.GRAFTING


def test_muted_holds_the_forward_at_zero_and_lets_go(model, x):
    bare = model(x).detach()
    to_state(model, "body.0", 0, "FINE_TUNING")
    grown = model(x).detach()
    assert not torch.equal(grown, bare)
    with pytest.raises(RuntimeError, match="stop"), model.muted("body.0", 0):
        with model.muted("body.0", 0):
            assert torch.equal(model(x), bare)
        assert torch.equal(model(x), bare)
        raise RuntimeError("stop")
    assert torch.equal(model(x), grown)


@pytest.mark.parametrize(
    ("kind", "middle"),
    [("UNSPECIFIED", 0.5), ("LINEAR", 0.5), ("COSINE", 0.5), ("SIGMOID", 0.5), ("DRIFT", 0.5)],
)
def test_schedules_come_from_their_message(model, kind, middle):
    to_state(model, "body.0", 0, "TRAINING")
    schedule = lifecycle_pb2.AlphaSchedule(
        kind=f"ALPHA_SCHEDULE_KIND_{kind}", steps=10, start=0.2, end=0.8
    )
    model.set_schedule("body.0", 0, schedule)
    model.advance("body.0", 0, "GRAFTING")
    alphas = [model.alpha("body.0", 0)]
    for _ in range(10):
        model.tick()
        alphas.append(model.alpha("body.0", 0))
    assert alphas[0] == pytest.approx(0.2) and alphas[-1] == pytest.approx(0.8)
    assert alphas[5] == pytest.approx(middle)
    assert alphas == sorted(alphas)
    if kind in ("COSINE", "SIGMOID"):
        assert alphas[1] < 0.26 - 0.01  # slower than linear at the start


# ---------------------------------------------------------------- birth and randomness


def test_nothing_draws_from_the_global_generator(x):
    host = Net()
    state = torch.get_rng_state()
    model = wrap(host)
    model.telemetry_interval = 1
    for seed, blueprint in enumerate(["bottleneck", "widen", "norm_mlp", "lora"]):
        model.germinate("body.0", seed, blueprint)
        model.advance("body.0", seed, "TRAINING")
    model(x).sum().backward()
    model.collect_signals(0)
    model.compare_with_original(x)
    copy.deepcopy(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_birth_depends_on_kernel_and_place_alone():
    def born(slot, seed, global_seed):
        torch.manual_seed(global_seed)
        model = wrap(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
        model.germinate(slot, seed, "bottleneck", rank=2)
        return model.seed_parameters(slot, seed)[0]

    assert torch.equal(born("0", 0, 1), born("0", 0, 2))
    assert not torch.equal(born("0", 0, 1), born("0", 1, 1))
    assert not torch.equal(born("0", 0, 1), born("1", 0, 1))


def test_every_seed_is_the_identity_at_birth(model, x):
    bare = model(x).detach()
    for seed, blueprint in enumerate(["bottleneck", "widen", "norm_mlp", "glu"]):
        model.germinate("body.0", seed, blueprint)
        for stage in range(State.TRAINING, State.FINE_TUNING + 1):
            model.advance("body.0", seed, stage)
    assert torch.equal(model(x), bare)


def test_a_noop_seed_costs_no_hook(model, x):
    model.germinate("body.0", 0, "noop")
    model.advance("body.0", 0, "TRAINING")
    model.advance("body.0", 0, "GRAFTING")
    assert not model.slots["body.0"].hooked
    assert model.seed_parameters("body.0", 0) == []
    assert model.occupied_seeds() == [("body.0", 0)]


# ---------------------------------------------------------------- as a module


def test_state_dict_holds_tensors_only_and_round_trips(model, x):
    to_state(model, "body.0", 0, "FINE_TUNING")
    to_state(model, "keys", 1, "FINE_TUNING", "norm_mlp", rank=1)
    state = model.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    torch.manual_seed(9)
    other = wrap(Net())
    to_state(other, "body.0", 0, "FINE_TUNING")
    to_state(other, "keys", 1, "FINE_TUNING", "norm_mlp", rank=1)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert other.load_state_dict(copy.deepcopy(state)).missing_keys == []
    assert torch.equal(other(x), model(x))


def test_a_model_can_be_moved_after_seeds_were_planted(model, x):
    to_state(model, "body.0", 0, "FINE_TUNING")
    to_state(model, "keys", 0, "FINE_TUNING", "norm_mlp", rank=1)
    expected = model(x)
    model.double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model(x.double()).dtype == torch.float64
    torch.testing.assert_close(model(x.double()).float(), expected)
    assert model.compare_with_original(x.double())["max_abs_difference"] > 0
    assert model.signature("body.0", 1, OUTPUT).dtype == kernel_pb2.DATA_TYPE_FLOAT64
    model.germinate("body.0", 1, "lora", rank=1)
    assert model.seed_parameters("body.0", 1)[0].dtype == torch.float64
    model.bfloat16()
    assert model(x.bfloat16()).dtype == torch.bfloat16
    model.to("meta")
    assert all(p.device.type == "meta" for p in model.parameters())


def test_autocast_keeps_parameters_in_full_precision(model, x):
    to_state(model, "body.0", 0, "FINE_TUNING")
    to_state(model, "body.0", 1, "FINE_TUNING", "norm_mlp", rank=1)
    to_state(model, "keys", 0, "FINE_TUNING", "widen", rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.1)


def test_functional_call_uses_the_tensors_that_it_is_given(model, x):
    to_state(model, "body.0", 0, "FINE_TUNING")
    to_state(model, "keys", 0, "FINE_TUNING", "norm_mlp", rank=1)
    given = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    result = torch.func.functional_call(model, given, (x,))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(given[name])
    assert torch.equal(result, model(x))


def test_training_mode_passes_through(model):
    to_state(model, "keys", 0, "TRAINING", "norm_mlp", rank=1)
    model.eval()
    assert not any(module.training for module in model.modules())
    model.germinate("body.0", 0, "norm_mlp", rank=1)
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())
    frozen = wrap(Net().eval())
    assert not frozen.training and not any(m.training for m in frozen.modules())


def test_a_copied_host_keeps_acting_without_its_model(model, x):
    """As averaging of weights does it: the hooks of a copied host work on their own."""
    to_state(model, "body.0", 0, "FINE_TUNING")
    twin = copy.deepcopy(model.host)
    expected = model(x)
    model.cull("body.0", 0)
    assert torch.equal(twin(x), expected)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged(x), model(x))


def test_an_optimizer_trains_the_seed_and_only_then_it_acts(model, x):
    target = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    model.germinate("keys", 0, "widen", rank=8)
    model.advance("keys", 0, "TRAINING")
    optimizer = torch.optim.SGD(model.seed_parameters("keys", 0), lr=0.1)
    before = nn.functional.mse_loss(model(x), target)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
    assert torch.equal(nn.functional.mse_loss(model(x), target), before)
    model.advance("keys", 0, "GRAFTING")
    model.set_seed_alpha("keys", 0, 1.0)
    assert nn.functional.mse_loss(model(x), target) < before


def test_unwrap_ends_the_model(model, x):
    to_state(model, "body.0", 0, "FINE_TUNING")
    host = unwrap(model)
    with pytest.raises(AttributeError, match="host"):
        model(x)
    assert isinstance(wrap(host), MorphableModel)


def test_a_model_that_is_gone_leaves_its_host_free(x):
    host = Net()
    wrap(host)
    gc.collect()
    model = wrap(host)
    to_state(model, "body.0", 0, "TRAINING")
    del model
    gc.collect()
    with pytest.raises(ValueError, match="wrapped already"):
        wrap(host)  # a seed in it still acts


def test_a_copy_is_wrapped_as_well(model):
    clone = copy.deepcopy(model)
    with pytest.raises(ValueError, match="wrapped already"):
        wrap(clone.host)


# ---------------------------------------------------------------- what it says of itself


def test_comparison_with_the_original(model, x):
    assert model.compare_with_original(x) == {
        "max_abs_difference": 0.0,
        "max_rel_difference": 0.0,
        "cosine": pytest.approx(1.0),
    }
    original = model(x).detach().double()
    with torch.no_grad():
        model.host.keys.bias += 1.0
    difference = (model(x).detach().double() - original).abs().max()
    result = model.compare_with_original(x)
    assert result["max_abs_difference"] == pytest.approx(float(difference))
    assert result["max_rel_difference"] == pytest.approx(float(difference / original.abs().max()))
    assert result["cosine"] < 1
    assert not any("original" in name for name in model.state_dict())
    assert model.training


def test_without_an_original_there_is_nothing_to_compare_with(x):
    model = wrap(Net(), preserve_original=False)
    with pytest.raises(ValueError, match="preserve_original was False"):
        model.compare_with_original(x)


def test_a_host_that_cannot_be_copied_is_refused_with_a_way_out():
    host = Net()
    host.cache = torch.ones(2, requires_grad=True) * 2  # no leaf
    with pytest.raises(ValueError, match="cannot be copied.*preserve_original=False"):
        wrap(host)
    assert wrap(host, preserve_original=False).cache is host.cache


def test_statistics_are_typed_records(model, x):
    to_state(model, "body.0", 1, "GRAFTING")
    model.set_seed_alpha("body.0", 1, 0.5)
    model(x)
    stats = model.get_layer_stats("body.0")
    assert (stats.kind, stats.width, stats.source_width) == ("LINEAR", 8, 6)
    assert (stats.hooked, stats.calls, stats.missed_steps) == (True, 1, 0)
    seed = stats.seeds[1]
    assert (seed.state, seed.alpha, seed.chunk) == (State.GRAFTING, 0.5, (2, 4))
    assert seed.blueprint == "bottleneck" and seed.kernel
    assert stats.num_parameters == seed.num_parameters
    assert seed.num_parameters == sum(p.numel() for p in model.seed_parameters("body.0", 1))
    assert list(model.get_layer_stats()) == model.get_layer_names()
    whole = model.get_model_stats()
    assert (whole.num_slots, whole.num_seeds) == (2, 8)
    assert whole.seeds_by_state == {State.DORMANT: 7, State.GRAFTING: 1}
    assert whole.host_parameters == sum(p.numel() for p in model.host.parameters())
    assert whole.seed_parameters == stats.num_parameters
    with pytest.raises(ValueError, match="slot is 'nope'"):
        model.get_layer_stats("nope")
    assert "body.0, linear, width=8" in repr(model)


def test_the_kernel_cache_counts(model):
    model.germinate("body.0", 0, "lora", rank=2)
    model.germinate("body.0", 1, "lora", rank=2)
    stats = model.get_model_stats().cache
    assert (stats.hits, stats.misses, stats.num_kernels) == (1, 1, 1)


def test_a_cache_without_room_still_lets_kernels_in(x):
    model = wrap(Net(), cache_size_mb=0)
    model(x)
    slot = model.get_layer_names()[0]
    model.germinate(slot, 0, "bottleneck", rank=2)
    assert model.kernel_cache.stats().num_kernels == 1
    model.unload_kernel(slot, 0)
    assert model.kernel_cache.stats().num_kernels == 0


def test_a_host_that_keeps_its_last_activations_can_be_copied(x):
    class Keeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)
            self.seen = []

        def forward(self, x):
            self.last = self.layer(x)
            self.seen = [{"last": self.last}]
            return self.last

    model = wrap(Keeper())
    y = model(x)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), y)
    assert clone.host.layer.weight is not model.host.layer.weight


def test_the_bank_is_native(model):
    assert isinstance(model.bank, _C.SeedBank)
    assert (model.bank.num_slots, model.bank.num_seeds) == (2, 8)
