"""The bill of a run: every operation is on it, counted by torch's own counter."""

import copy

import pytest
import torch
from torch import Tensor
from torch import nn

import esper
from esper.tolaria import tasks
from esper.tolaria.cost import TrainingCost
from esper.tolaria.cost import count_flops

FORWARD = 2 * (64 * 8 + 8 * 10)
BACKWARD = 2 * (64 * 8 + 2 * 8 * 10)  # weights of both layers, and the hidden features


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    return tasks.get("digits")


def train(model: nn.Module, task: tasks.Task, steps: int) -> int:
    """Returns the number of samples trained on."""
    model.train()
    samples = 0
    for batch in task.train_batches(0, 0)[:steps]:
        task.loss(model, batch).mean().backward()
        samples += len(batch[1])
    return samples


def test_counter_sees_forward_and_backward() -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_plain_model_is_charged_by_the_sample(task: tasks.Task) -> None:
    model = task.host()
    cost = TrainingCost(model, task.loss, task.held_out_batches())
    assert cost.total == 0
    samples = train(model, task, steps=3)
    assert cost.by_category == {
        "train": samples * (FORWARD + BACKWARD),
        "evaluation": 0,
        "trial": 0,
    }
    cost.add_evaluation(100)
    cost.add_trial(50)
    assert cost.by_category["evaluation"] == 100 * FORWARD
    assert cost.by_category["trial"] == 50 * FORWARD
    assert cost.total == sum(cost.by_category.values())
    with torch.no_grad():
        model(task.train.inputs)
    model.eval()(task.train.inputs)
    assert cost.by_category["train"] == samples * (FORWARD + BACKWARD), "only training is training"
    cost.close()
    train(model, task, steps=1)
    assert cost.by_category["train"] == samples * (FORWARD + BACKWARD)


def test_seeds_are_charged_in_the_state_that_they_are_in(task: tasks.Task) -> None:
    model = esper.wrap(task.host(), target_layers=["net"], telemetry_enabled=False)
    model.train()
    model(task.train.inputs[:2])
    cost = TrainingCost(model, task.loss, task.held_out_batches())
    bare = cost.step_flops_per_sample()
    assert bare == FORWARD + BACKWARD
    model.germinate("net", 0, "bottleneck", rank=4, source="input")
    assert cost.step_flops_per_sample() == bare, "an idle seed costs nothing"
    spent = [bare]
    chunk = 3  # the first of four seeds on ten features
    one_way = 2 * (64 * 4 + 4 * chunk)
    for state in ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING"):
        model.advance("net", 0, state)
        if state == "GRAFTING":
            model.set_seed_alpha("net", 0, 0.5)
        spent.append(cost.step_flops_per_sample())
        blended = state != "TRAINING"
        assert cost.forward_flops_per_sample() == FORWARD + (one_way if blended else 0)
    _, training, grafting, settled, evaluating, tuning = spent
    assert bare < settled == evaluating < training < grafting == tuning


def test_telemetry_probes_are_on_the_bill(task: tasks.Task) -> None:
    model = esper.wrap(task.host(), target_layers=["net"])
    model.train()
    model(task.train.inputs[:2])
    cost = TrainingCost(model, task.loss, task.held_out_batches())
    rare = cost.step_flops_per_sample()
    model.telemetry_interval = 1
    always = cost.step_flops_per_sample()
    model.enable_telemetry(False)
    bare = cost.step_flops_per_sample()
    assert bare == FORWARD + BACKWARD
    assert always - bare == pytest.approx(8 * (rare - bare)), "one forward in eight is sampled"
    assert rare > bare


def test_counting_leaves_no_trace(task: tasks.Task) -> None:
    model = esper.wrap(task.host(), target_layers=["net"])
    plain = task.host()
    outputs: list[Tensor] = []
    for one in (model, plain):
        torch.manual_seed(3)
        cost = TrainingCost(one, task.loss, task.held_out_batches())
        train(one, task, steps=2)
        cost.add_evaluation(1)
        outputs.append(torch.rand(3))
        assert all(p.grad is not None for p in one.parameters())
    torch.manual_seed(3)
    assert torch.equal(outputs[0], torch.rand(3))
    assert torch.equal(outputs[1], outputs[0])
    bare = task.host()
    train(bare, task, steps=2)
    for counted in (model.host, plain):
        for a, b in zip(counted.parameters(), bare.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            assert torch.equal(a.grad, b.grad)


def wrapped(task: tasks.Task) -> esper.MorphableModel:
    return esper.wrap(
        task.host(), target_layers=["net"], seeds_per_layer=1, telemetry_enabled=False
    )


def test_another_kernel_in_the_same_seed_has_another_price(task: tasks.Task) -> None:
    model = wrapped(task)
    model(task.train.inputs[:2])
    cost = TrainingCost(model, task.loss, task.held_out_batches())
    found = []
    for rank in (2, 16):
        model.germinate("net", 0, "widen", rank=rank)
        model.advance("net", 0, "TRAINING")
        found.append(cost.step_flops_per_sample() - FORWARD - BACKWARD)
        model.unload_kernel("net", 0)
        model.tick()
    assert found[1] == 8 * found[0] > 0


def test_a_frozen_host_has_no_backward_to_pay_for(task: tasks.Task) -> None:
    model = wrapped(task)
    model.host.requires_grad_(False)
    cost = TrainingCost(model, task.loss, task.held_out_batches())
    assert cost.step_flops_per_sample() == cost.forward_flops_per_sample() == FORWARD


def test_samples_are_counted_in_any_form_of_input() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, scale: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return scale * self.layer(batch["x"]).square().sum(dim=1)

    model = Host()
    batches = [{"x": torch.ones(5, 3)}]
    cost = TrainingCost(model, lambda m, batch: m(torch.tensor(2.0), batch), batches)
    model(torch.tensor(2.0), {"x": torch.ones(7, 3)})
    assert cost.total == round(7 * cost.step_flops_per_sample()) > 0


@pytest.mark.parametrize("grows", [False, True])
def test_a_copy_of_the_model_counts_nothing_and_copies_no_data(
    task: tasks.Task, grows: bool
) -> None:
    model = wrapped(task) if grows else task.host()
    cost = TrainingCost(model, task.loss, task.held_out_batches())
    copied = copy.deepcopy(model)
    assert all(hook.__self__ is cost for hook in copied._forward_pre_hooks.values())
    train(copied, task, steps=2)
    assert cost.total == 0
    train(model, task, steps=1)
    spent = cost.total
    assert spent > 0
    cost.close()
    train(model, task, steps=1)
    assert cost.total == spent


def test_no_held_out_batch_is_refused(task: tasks.Task) -> None:
    with pytest.raises(ValueError, match="0 batches"):
        TrainingCost(task.host(), task.loss, [])


def test_the_copy_that_is_counted_has_no_memory_for_parameters_or_gradients(
    task: tasks.Task,
) -> None:
    model = esper.wrap(task.host(), target_layers=["net"])
    model(task.train.inputs[:2])
    model.germinate("net", 0, "bottleneck", rank=2)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    seen: list[nn.Module] = []

    def loss(module: nn.Module, batch: object) -> Tensor:
        seen.append(module)
        assert all(parameter.grad is None for parameter in module.parameters())
        return task.loss(module, batch)

    TrainingCost(model, loss, task.held_out_batches()).step_flops_per_sample()
    (twin,) = set(seen)
    assert twin is not model
    assert len(seen) > 2, "forward, and steps with and without probes"
    assert {parameter.data_ptr() for parameter in twin.parameters()} == own
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert twin.archive[0] is model.archive[0]
    assert all(parameter.grad is None for parameter in (*twin.parameters(), *model.parameters()))
