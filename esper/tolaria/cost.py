"""What a run costs: floating-point operations, counted and not estimated.

``torch.utils.flop_counter`` counts one forward and backward of a copy of the model for every
structure that the model takes on; the result is multiplied by the samples that went through. So
seeds in every state, telemetry probes, held-out evaluation and trials are all on the bill, and
the training loop runs at full speed. The copy shares the model's parameters in memory.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from esper.common.sharding import plain_copy
from esper.kasmina import MorphableModel
from esper.kasmina import SeedLifecycleState
from esper.kasmina.grafts import Graft
from esper.tolaria.evaluation import Batch
from esper.tolaria.evaluation import SampleLoss
from esper.tolaria.randomness import forked
from esper.tolaria.ranks import Ranks


def count_flops(run: Callable[[], object]) -> int:
    """Returns the floating-point operations of ``run`` (2 per multiply-add), backward included."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@dataclass(frozen=True, slots=True)
class _PerSample:
    """Floating-point operations for one sample.

    Attributes:
        forward: Of a forward in eval mode.
        step: Of a training forward and backward.
        probes: What it costs more where every slot is sampled.
    """

    forward: float
    step: float
    probes: float


class TrainingCost:
    """Counts what training one model costs.

    Args:
        model: A plain or wrapped model. The samples of its training forwards are counted, by a
            forward pre-hook or a meter.
        loss: Per-sample loss, as in ``Session``.
        batches: Batches like those that are trained on; the first is the sample measured.

    Raises:
        ValueError: If there is no batch.
    """

    def __init__(self, model: nn.Module, loss: SampleLoss, batches: Iterable[Batch]) -> None:
        self._model = model
        self._loss = loss
        with forked():
            example = next(iter(batches), None)
        if example is None:
            raise ValueError("batches has 0 batches, but one is needed to measure the cost")
        self._example = example
        self._spent = {"train": 0.0, "evaluation": 0.0, "trial": 0.0}
        self._pooled = 0.0  # of training, by all ranks
        self._measured: dict[object, _PerSample] = {}
        self._current: tuple[object, _PerSample] | None = None
        self._hook: RemovableHandle | None = None
        if isinstance(model, MorphableModel):
            model.meters.append(self._count)
        else:
            self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, object]) -> "TrainingCost":
        # A copy of the model takes its hook along; it counts nothing there, and copies no data.
        return self

    @property
    def by_category(self) -> dict[str, int]:
        """Operations spent on training (probes included), evaluation and trials."""
        return {name: round(value) for name, value in self._spent.items()}

    @property
    def total(self) -> int:
        """Operations spent so far."""
        return sum(self.by_category.values())

    def add_evaluation(self, num_samples: int) -> None:
        """Charges a held-out forward pass of ``num_samples`` samples."""
        self._spent["evaluation"] += num_samples * self._per_sample().forward

    def add_trial(self, num_samples: int) -> None:
        """Charges the second pass of a held-out trial over ``num_samples`` samples."""
        self._spent["trial"] += num_samples * self._per_sample().forward

    def forward_flops_per_sample(self) -> int:
        """Operations of the model's forward for one sample, as it stands."""
        return round(self._per_sample().forward)

    def step_flops_per_sample(self) -> float:
        """Operations of one training forward and backward for one sample, as the model stands.

        Probes count as they do at the telemetry interval, unstretched.
        """
        costs, model = self._per_sample(), self._model
        if isinstance(model, MorphableModel):  # without telemetry the probes cost 0
            return costs.step + costs.probes / model.telemetry_interval
        return costs.step

    @property
    def spent(self) -> dict[str, float]:
        """Operations by category, unrounded; ``resume`` takes them."""
        return dict(self._spent)

    def resume(self, spent: Mapping[str, float]) -> None:
        """Goes on from what a run has spent."""
        self._spent.update(spent)
        self._pooled = self._spent["train"]

    def pool(self, ranks: Ranks) -> None:
        """Adds what the other ranks have trained since the last time.

        Evaluations and trials are charged whole on every rank already.
        """
        if ranks.is_shared:
            [new] = ranks.sum([self._spent["train"] - self._pooled])
            self._pooled += new
            self._spent["train"] = self._pooled

    def close(self) -> None:
        """Stops counting."""
        if self._hook is not None:
            self._hook.remove()
        elif isinstance(self._model, MorphableModel):
            self._model.meters.remove(self._count)

    def _before_forward(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        if module is self._model and module.training and torch.is_grad_enabled():
            self._count(args, kwargs, 0.0)

    def _count(
        self, args: tuple[object, ...], kwargs: Mapping[str, object], sampled_share: float
    ) -> None:
        costs = self._per_sample()
        cost = costs.step + sampled_share * costs.probes
        self._spent["train"] += _num_samples(args, kwargs) * cost

    def _per_sample(self) -> _PerSample:
        model = self._model
        known = None  # asked in every forward: what cannot have changed is not looked at again
        if isinstance(model, MorphableModel):
            known = (model.revision, model.telemetry_enabled)
        if self._current is None or self._current[0] != known:
            structure = _structure(model)
            if structure not in self._measured:
                self._measured[structure] = self._measure()
            self._current = (known, self._measured[structure])
        return self._current[1]

    def _measure(self) -> _PerSample:
        """Measures a copy of the model."""
        model = self._model
        twin = plain_copy(model, model.archive if isinstance(model, MorphableModel) else ())
        for parameter in twin.parameters():
            if parameter.requires_grad:  # a second set of gradients would be as large as the model
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        if isinstance(twin, MorphableModel):
            for slot, seed in twin.occupied_seeds():
                # The first and last step of a ramp cost less; whichever is measured stands for all.
                if twin.seed_state(slot, seed) is SeedLifecycleState.GRAFTING:
                    twin.set_seed_alpha(slot, seed, 0.5)
        with forked():
            twin.eval()
            with torch.no_grad():
                num_samples = len(self._loss(twin, self._example))
                forward = count_flops(lambda: self._loss(twin, self._example))
            twin.train()
            probed = None
            if isinstance(twin, MorphableModel) and twin.telemetry_enabled:
                twin.telemetry_interval = 1
                probed = count_flops(lambda: self._train_step(twin))
                twin.enable_telemetry(False)
            step = count_flops(lambda: self._train_step(twin))
        probes = 0 if probed is None else probed - step
        return _PerSample(forward / num_samples, step / num_samples, probes / num_samples)

    def _train_step(self, model: nn.Module) -> None:
        with torch.enable_grad():
            loss = self._loss(model, self._example).mean()
            if loss.requires_grad:  # a frozen host without seeds has no backward
                torch.autograd.backward(loss)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _num_samples(args: tuple[object, ...], kwargs: Mapping[str, object]) -> int:
    """Size of the batch: the first axis of the first tensor that has one, in containers too."""
    if args and isinstance(args[0], torch.Tensor) and args[0].dim() > 0:
        return len(args[0])  # the usual case, without a walk through containers
    for value in tree_leaves((args, dict(kwargs))):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return len(value)
    return 0


def _structure(model: nn.Module) -> object:
    """Returns a key that changes whenever the model's cost may change."""
    if not isinstance(model, MorphableModel):
        return None
    kernels = tuple(
        graft.digest
        for layer in model.slots.values()
        for graft in layer.grafts.values()
        if isinstance(graft, Graft)
    )
    return model.bank.states().tobytes(), kernels, model.telemetry_enabled
