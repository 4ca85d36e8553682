"""What a run costs: floating-point operations, counted and not estimated.

``torch.utils.flop_counter`` counts one forward and backward of a copy of the model for every
structure that the model takes on; the result is multiplied by the samples that went through. So
seeds in every state, telemetry probes, held-out evaluation and trials are all on the bill, and
the training loop runs at full speed.
"""

import copy
from collections.abc import Callable
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina import MorphableModel
from esper.tolaria.evaluation import Batch
from esper.tolaria.evaluation import SampleLoss


def count_flops(run: Callable[[], object]) -> int:
    """Returns the floating-point operations of ``run`` (2 per multiply-add), backward included."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


class TrainingCost:
    """Counts what training one model costs.

    Args:
        model: A plain or wrapped model. A forward pre-hook counts the samples of its training
            forwards.
        loss: Per-sample loss, as in ``Session``.
        batches: Batches like those that are trained on; the first is the sample measured.
    """

    def __init__(self, model: nn.Module, loss: SampleLoss, batches: Iterable[Batch]) -> None:
        self._model = model
        self._loss = loss
        with torch.random.fork_rng():
            self._example = next(iter(batches))
        self._spent = {"train": 0.0, "evaluation": 0.0, "trial": 0.0}
        self._measured: dict[object, tuple[float, float]] = {}
        self._hook = model.register_forward_pre_hook(self._count_samples, with_kwargs=True)

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
        self._spent["evaluation"] += num_samples * self._per_sample()[0]

    def add_trial(self, num_samples: int) -> None:
        """Charges the second pass of a held-out trial over ``num_samples`` samples."""
        self._spent["trial"] += num_samples * self._per_sample()[0]

    def forward_flops_per_sample(self) -> int:
        """Operations of the model's forward for one sample, as it stands."""
        return round(self._per_sample()[0])

    def step_flops_per_sample(self) -> float:
        """Operations of one training forward and backward for one sample, as the model stands."""
        return self._per_sample()[1]

    def close(self) -> None:
        """Stops counting."""
        self._hook.remove()

    def _count_samples(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        if module.training and torch.is_grad_enabled():
            tensors = [*args, *kwargs.values()]
            samples = next((len(t) for t in tensors if isinstance(t, torch.Tensor)), 0)
            self._spent["train"] += samples * self._per_sample()[1]

    def _per_sample(self) -> tuple[float, float]:
        structure = _structure(self._model)
        if structure not in self._measured:
            self._measured[structure] = self._measure()
        return self._measured[structure]

    def _measure(self) -> tuple[float, float]:
        """Returns (forward, training step) operations per sample, measured on a copy."""
        self._hook.remove()  # the copy must not count itself
        try:
            twin = copy.deepcopy(self._model)
        finally:
            self._hook = self._model.register_forward_pre_hook(
                self._count_samples, with_kwargs=True
            )
        with torch.random.fork_rng():
            twin.eval()
            with torch.no_grad():
                num_samples = len(self._loss(twin, self._example))
                forward = count_flops(lambda: self._loss(twin, self._example))
            twin.train()
            if isinstance(twin, MorphableModel) and twin.telemetry_enabled:
                interval = twin.telemetry_interval
                twin.enable_telemetry(False)
                plain = count_flops(lambda: self._train_step(twin))
                twin.enable_telemetry(True)
                twin.telemetry_interval = 1
                probed = count_flops(lambda: self._train_step(twin))
                step = plain + (probed - plain) / interval
            else:
                step = float(count_flops(lambda: self._train_step(twin)))
        return forward / num_samples, step / num_samples

    def _train_step(self, model: nn.Module) -> None:
        with torch.enable_grad():
            torch.autograd.backward(self._loss(model, self._example).mean())


def _structure(model: nn.Module) -> object:
    """Returns a key that changes whenever the model's cost may change."""
    if isinstance(model, MorphableModel):
        sampled = model.telemetry_interval if model.telemetry_enabled else None
        return model.bank.states().tobytes(), sampled
    return None
