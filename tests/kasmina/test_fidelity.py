"""Real torch modules of every make: seeds may not change what they should not change."""

import copy

import pytest
import torch
from fidelity_hosts import CASES
from torch import Tensor

from esper.blueprints import reference_module
from esper.kasmina import unwrap
from esper.kasmina import wrap
from esper.kasmina.outputs import find_tensor
from esper.kasmina.outputs import replace_tensor


def tensors_in(output):
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for value in values if value is not None for t in tensors_in(value)]


def step(model, args, kwargs):
    """One training step from a set random state; everything that it leaves behind."""
    model.zero_grad()
    args = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
    torch.manual_seed(11)
    outputs = [t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point()]
    loss = sum((t.float() * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in outputs)
    if loss.requires_grad:
        loss.backward()
    host = model.host if hasattr(model, "host") else model
    return {
        "outputs": [t.detach().clone() for t in outputs],
        "strides": [t.stride() for t in outputs],
        "gradients": {
            name: p.grad.clone() for name, p in host.named_parameters() if p.grad is not None
        },
        "input gradients": [a.grad for a in args if a.grad is not None],
        "buffers": {name: b.clone() for name, b in host.named_buffers()},
        "random state": torch.get_rng_state(),
    }


def assert_identical(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert_same(value, right[key], key)


def assert_same(left, right, where):
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape, where
        # -0.0 counts as different from 0.0, and NaN as equal to itself.
        same = torch.equal(left, right) and torch.equal(torch.signbit(left), torch.signbit(right))
        assert same, where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key, value in left.items():
            assert_same(value, right[key], f"{where} {key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for index, value in enumerate(left):
            assert_same(value, right[index], f"{where} {index}")
    else:
        assert left == right, where


def prepared(case):
    """A bare host and a wrapped twin, after one forward each, which tells slots their widths."""
    make, args, kwargs, targets = CASES[case]
    torch.manual_seed(0)
    bare = make()
    model = wrap(copy.deepcopy(bare), targets, seeds_per_layer=3)
    model.telemetry_interval = 1
    for module in (bare, model):
        torch.manual_seed(1)
        module(*args, **kwargs)
    return bare, model, args, kwargs


def plant_everywhere(model):
    """A native seed on the output, one on the input where there is one, one in the interpreter."""
    planted = []
    for name, layer in model.slots.items():
        blueprints = [("bottleneck", {"rank": 2}), ("glu", {"rank": 2}), ("norm_mlp", {"rank": 2})]
        if layer.source_width is not None:
            blueprints[1] = ("widen", {"rank": 2})
        for seed, (blueprint, hyperparameters) in enumerate(blueprints):
            model.germinate(name, seed, blueprint, **hyperparameters)
            planted.append((name, seed))
            for parameter in model.seed_parameters(name, seed):
                # Not zero as at birth: a seed in TRAINING must be without effect whatever it is.
                torch.nn.init.normal_(
                    parameter, std=0.3, generator=torch.Generator().manual_seed(4)
                )
    return planted


def advance_to(model, planted, state):
    path = ["TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED"]
    for slot, seed in planted:
        start = 0
        current = model.seed_state(slot, seed).name
        if current in path:
            start = path.index(current) + 1
        for stage in path[start : path.index(state) + 1]:
            model.advance(slot, seed, stage)


@pytest.mark.parametrize("case", CASES)
def test_dormant_slots_change_nothing_even_when_probed(case):
    bare, model, args, kwargs = prepared(case)
    assert_identical(step(bare, args, kwargs), step(model, args, kwargs))
    assert model.get_model_stats().sampled_forwards >= 2
    assert not any(module._forward_hooks for module in model.host.modules())


@pytest.mark.parametrize("case", CASES)
def test_seeds_in_training_change_neither_outputs_nor_host_gradients(case):
    bare, model, args, kwargs = prepared(case)
    planted = plant_everywhere(model)
    advance_to(model, planted, "TRAINING")
    assert_identical(step(bare, args, kwargs), step(model, args, kwargs))
    # A last layer that is not followed by anything still feels the loss.
    trained = [p for at in planted for p in model.seed_parameters(*at) if p.grad is not None]
    assert trained
    assert all(bool(torch.isfinite(p.grad).all()) for p in trained)


@pytest.mark.parametrize("case", CASES)
def test_seeds_in_training_see_the_true_gradient(case):
    """The gradient of a seed in TRAINING is the one that it would have at alpha -> 0."""
    _, model, args, kwargs = prepared(case)
    planted = plant_everywhere(model)
    advance_to(model, planted, "TRAINING")
    step(model, args, kwargs)
    trained = {at: [p.grad for p in model.seed_parameters(*at)] for at in planted}
    for at in planted:
        model.advance(*at, "GRAFTING")
    alpha = 2.0**-13
    for at in planted:
        model.set_seed_alpha(*at, alpha)
    step(model, args, kwargs)
    for at, gradients in trained.items():
        for straight, parameter in zip(gradients, model.seed_parameters(*at), strict=True):
            if straight is None:
                assert parameter.grad is None
                continue
            grafted = parameter.grad.double() / alpha
            tolerance = 0.02 if straight.dtype in (torch.float32, torch.float64) else 0.2
            scale = straight.abs().max().double() + 1e-2
            assert float((grafted - straight.double()).abs().max() / scale) < tolerance


def plain_twin(bare, model):
    """The bare host with the same seeds, written with hooks of plain torch operations."""
    twin = copy.deepcopy(bare)
    functions = {}
    for name, layer in model.slots.items():
        pieces = []
        for seed in range(layer.num_seeds):
            graft = layer.graft(seed)
            kernel = type(graft.kernel)()
            kernel.CopyFrom(graft.kernel)
            kernel.signature.slot_kind = 1  # features last
            weights = dict(
                zip(
                    [spec.name for spec in kernel.parameters],
                    graft.ordered_parameters(),
                    strict=True,
                )
            )
            function = reference_module(kernel, weights).to(layer.dtype)
            pieces.append((*layer.bounds[seed], graft.reads_input, function))
            functions[name, seed] = function
        twin.get_submodule(name).register_forward_hook(
            plain_hook(pieces, layer.channel_axis), with_kwargs=True
        )
    return twin, functions


def plain_hook(pieces, axis):
    axis = -1 if axis is None else axis

    def hook(module, args, kwargs, output):
        path, host = find_tensor(output)
        h = host.movedim(axis, -1)
        inputs = [*args, *(kwargs[name] for name in ("query",) if name in kwargs)]
        x = inputs[0].movedim(axis, -1) if inputs[0].is_floating_point() else None
        chunks = [
            h[..., begin:end] + function(x if reads_input else h[..., begin:end])
            for begin, end, reads_input, function in pieces
        ]
        y = torch.cat(chunks, dim=-1).movedim(-1, axis)
        # Dropout draws in the order of memory, so the layout counts.
        return replace_tensor(output, path, torch.empty_like(host).copy_(y))

    return hook


@pytest.mark.parametrize("state", ["GRAFTING", "FINE_TUNING"])
@pytest.mark.parametrize("case", CASES)
def test_at_alpha_one_everything_equals_the_plain_expression(case, state):
    bare, model, args, kwargs = prepared(case)
    planted = plant_everywhere(model)
    advance_to(model, planted, state)
    if state == "GRAFTING":
        for at in planted:
            model.set_seed_alpha(*at, 1.0)
    twin, functions = plain_twin(bare, model)
    got, expected = step(model, args, kwargs), step(twin, args, kwargs)
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in bare.parameters())
    tolerance = {"rtol": 0.1, "atol": 0.3} if half else {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(got["outputs"], expected["outputs"], **tolerance)
    torch.testing.assert_close(got["gradients"], expected["gradients"], **tolerance)
    torch.testing.assert_close(got["input gradients"], expected["input gradients"], **tolerance)
    for at, function in functions.items():
        for ours, plain in zip(model.seed_parameters(*at), function.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, plain.grad, **tolerance)


@pytest.mark.parametrize(
    "state",
    ["TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", ["mlp", "residual convolutions", "encoder layer with dropout"])
def test_a_broken_seed_never_reaches_the_host(case, state, value):
    bare, model, args, kwargs = prepared(case)
    planted = plant_everywhere(model)
    for slot, seed in planted:
        for parameter in model.seed_parameters(slot, seed):
            torch.nn.init.constant_(parameter, value)
    advance_to(model, planted, state)
    if state == "GRAFTING":
        for at in planted:
            model.set_seed_alpha(*at, 0.5)
    # What is not finite is not added at all: the host computes as if there were no seed.
    plain, broken = step(bare, args, kwargs), step(model, args, kwargs)
    assert_same(plain["outputs"], broken["outputs"], "outputs")
    if state == "TRAINING":
        assert_identical(plain, broken)
    # Elsewhere gradients pass the seeds, which may change their memory layout and so the rounding.
    torch.testing.assert_close(plain["gradients"], broken["gradients"])
    for parameter in model.parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())
    signals = {(s.slot, s.seed): s for s in model.collect_signals(0)}
    for at in planted:
        assert signals[at].num_nonfinite_rows > 0


@pytest.mark.parametrize("case", CASES)
def test_state_and_modules_of_the_host_stay_its_own(case):
    bare, model, args, kwargs = prepared(case)
    planted = plant_everywhere(model)
    advance_to(model, planted, "FINE_TUNING")
    assert list(model.host.state_dict()) == list(bare.state_dict())
    assert [type(m) for m in model.host.modules()] == [type(m) for m in bare.modules()]
    flags = [p.requires_grad for p in bare.parameters()]
    assert [p.requires_grad for p in model.host.parameters()] == flags
    host = model.host
    torch.manual_seed(3)
    for parameter in host.parameters():
        parameter.data.mul_(1.5)
    trained = copy.deepcopy(host.state_dict())
    assert unwrap(model) is host
    for module in host.modules():
        assert not module._forward_hooks and not module._forward_hooks_with_kwargs
    assert_same(dict(host.state_dict()), dict(trained), "state")
    assert wrap(host, CASES[case][3], seeds_per_layer=1).host is host


@pytest.mark.parametrize("case", CASES)
def test_a_copy_is_equal_and_independent(case):
    _, model, args, kwargs = prepared(case)
    planted = plant_everywhere(model)
    advance_to(model, planted, "FINE_TUNING")
    clone = copy.deepcopy(model)
    before = step(model, args, kwargs)
    assert_identical(before, step(clone, args, kwargs))
    for at in planted:
        clone.cull(*at)
    assert not any(module._forward_hooks for module in clone.host.modules())
    for module in clone.host.modules():
        for hook in module._forward_hooks.values():
            assert hook in set(clone.slots.values())
    buffers = {name: b for name, b in before["buffers"].items()}
    for name, buffer in model.host.named_buffers():
        buffer.copy_(buffers[name])
    again = step(model, args, kwargs)
    assert_same(again["outputs"], before["outputs"], "outputs")
    assert model.seed_state(*planted[0]).name == "FINE_TUNING"
    assert not set(map(id, clone.parameters())) & set(map(id, model.parameters()))
