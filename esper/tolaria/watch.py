"""Looks at losses and gradients, without holding up the device that computes them."""

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from esper.config import GovernorConfig
from esper.tolaria.surprise import Surprise
from esper.tolaria.surprise import SurpriseState

LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong.

    Attributes:
        reason: What, in words.
        is_finite: Whether it is a number out of the usual, and not one that is none.
    """

    reason: str
    is_finite: bool


@dataclass(frozen=True, slots=True)
class _Look:
    """Figures on their way to the host."""

    step: int
    names: tuple[str, ...]
    values: Sequence[Tensor] | Tensor  # on the host; complete once the event has come
    arrived: torch.cuda.Event | None


class Watch:
    """Collects the figures of a step and judges them: at once on a CPU, at the next look on a GPU.

    Args:
        config: How often it looks, and how many false alarms there may be.
        num_optimizers: Number of the user's optimizers.
        scaled: Whether a scaler leaves out steps that overflow; their losses do not count then.
    """

    def __init__(
        self, config: GovernorConfig, num_optimizers: int, *, scaled: bool = False
    ) -> None:
        self._scaled = scaled
        rate = min(0.5, config.false_alarm_rate * config.check_every_steps)
        names = (LOSS, *(_gradient(number) for number in range(num_optimizers)))
        self._usual = {
            name: Surprise(rate / len(names), forgives_return=name != LOSS) for name in names
        }
        self._figures: dict[str, Tensor] = {}
        self._looks: list[_Look] = []

    @property
    def suspicious(self) -> bool:
        """Whether one of the figures is unlikely, though not enough for an alarm."""
        return any(usual.suspicious for usual in self._usual.values())

    def note_loss(self, loss: Tensor | float) -> None:
        """Takes in a loss; the highest since the last look counts, with a scaler the last.

        Raises:
            ValueError: If it is not a scalar.
        """
        value = torch.as_tensor(loss).detach()
        if value.numel() != 1:
            raise ValueError(f"loss has shape {tuple(value.shape)}, but it must be a scalar")
        value = value.reshape(()).float()
        before = self._figures.get(LOSS)
        if before is not None and not self._scaled:
            value = torch.maximum(before, value)
        self._figures[LOSS] = value

    def note_gradients(self, number: int, optimizer: Optimizer) -> None:
        """Takes in the norm of the gradients that an optimizer has just used."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm: Tensor | None = torch.ops.esper.gradient_norm.default(parameters)
        if norm is None:  # none, or not plain ones on the CPU
            gradients = [p.grad.detach() for p in parameters if p.grad is not None]
            if not gradients:
                return
            norm = _norm(gradients)
        overflow = getattr(optimizer, "found_inf", None)  # a scaler's, for a fused optimizer
        if isinstance(overflow, Tensor):
            norm = norm.where(overflow.to(norm.device) == 0, 0.0)
        self._figures[_gradient(number)] = norm

    def note_weights(self, name: str, weights: Sequence[Tensor]) -> None:
        """Takes in weights, of which nothing is asked but that they are finite."""
        if weights:
            self._figures[name] = _norm([weight.detach() for weight in weights])

    def look(self, step: int) -> tuple[int, Finding | None]:
        """Judges what has arrived.

        Args:
            step: Optimizer steps taken.

        Returns:
            The last step that was judged, and what was found.
        """
        if self._figures:
            self._send(step)
        waits = bool(self._looks) and self._looks[-1].arrived is not None
        return self._judge(keep=int(waits))

    def look_closely(self) -> tuple[int, Finding | None]:
        """Waits for all that is on its way and judges it."""
        return self._judge(keep=0)

    def forget_figures(self) -> None:
        """Drops what has not been judged."""
        self._figures.clear()
        self._looks.clear()

    def forget_usual(self) -> None:
        """Takes whatever comes next for usual."""
        for usual in self._usual.values():
            usual.resume(SurpriseState())

    def state(self) -> dict[str, SurpriseState]:
        """Returns what is usual, by figure."""
        return {name: usual.state() for name, usual in self._usual.items()}

    def resume(self, state: Mapping[str, SurpriseState]) -> None:
        """Goes on from what was usual elsewhere."""
        for name, usual in self._usual.items():
            usual.resume(state.get(name, SurpriseState()))

    def _send(self, step: int) -> None:
        values: Sequence[Tensor] | Tensor = tuple(self._figures.values())
        device = values[0].device
        arrived = None
        if device.type == "cuda":
            sent = torch.stack([value.to(device) for value in values])
            host = torch.empty(sent.shape, dtype=sent.dtype, pin_memory=True)
            values = host.copy_(sent, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
        self._looks.append(_Look(step, tuple(self._figures), values, arrived))
        self._figures.clear()

    def _judge(self, keep: int) -> tuple[int, Finding | None]:
        step = -1
        while len(self._looks) > keep:
            look = self._looks.pop(0)
            step = look.step
            if look.arrived is not None:
                look.arrived.synchronize()
            figures = dict(zip(look.names, map(float, look.values), strict=True))
            finding = self._find(figures)
            if finding is not None:
                return step, finding
        return step, None

    def _find(self, figures: Mapping[str, float]) -> Finding | None:
        broken = [name for name, value in figures.items() if not math.isfinite(value)]
        if broken:
            return Finding(f"{', '.join(broken)} not finite", is_finite=False)
        for name, value in figures.items():
            usual = self._usual.get(name)
            if usual is not None and usual.observe(value):
                return Finding(f"{name} {value:.4g}, usually {usual.usual:.4g}", is_finite=True)
        return None


def _gradient(number: int) -> str:
    return "gradient norm" if number == 0 else f"gradient norm of optimizer {number}"


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    dense = [tensor._values() if tensor.is_sparse else tensor for tensor in tensors]
    if all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.is_floating_point() for t in dense):
        norm: Tensor = torch.ops.esper.total_norm.default(dense)
        return norm
    plain = [tensor for tensor in dense if not hasattr(tensor, "full_tensor")]
    if len(plain) == len(dense):
        return get_total_norm(plain).float()
    sharded = get_total_norm([tensor for tensor in dense if hasattr(tensor, "full_tensor")])
    whole: Tensor = getattr(sharded, "full_tensor", lambda: sharded)().float()
    return torch.hypot(whole, get_total_norm(plain).float().to(whole.device)) if plain else whole


def is_sound(host: nn.Module) -> bool:
    """Returns whether a host's parameters are finite and no buffer holds a NaN; waits for it."""
    parameters = [parameter.detach() for parameter in host.parameters()]
    if parameters and not bool(_norm(parameters).isfinite()):
        return False
    return not any(
        bool(buffer.isnan().any()) for buffer in host.buffers() if buffer.is_floating_point()
    )
