"""Compares a kernel with what its blueprint says: forward, gradients, and zero at birth."""

from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import esper
from esper.blueprints.checker import Layout
from esper.blueprints.digest import kernel_digest
from esper.blueprints.init import init_parameters
from esper.blueprints.init import torch_dtype
from esper.blueprints.interpreter import ReferenceModule
from esper.blueprints.kernels import CHANNEL_KINDS
from esper.blueprints.lowering import Lowered
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.kasmina.grafts import Graft
from esper.kasmina.grafts import Place
from esper.kasmina.ops import slot_forward

# Half types accumulate in float32, so only the rounding of operands and results counts there; the
# others round in every step of sums over tokens and features.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}
# Gradients smaller than this part of the largest one are compared with that part instead of with
# themselves, as a gradient that is 0 but for rounding has no relative error.
_SMALLEST_SCALE = 1e-3
_MAX_DRAWS = 8

_LEADING = {
    Layout.TOKENS: ((1,), (5,), (2, 17)),
    Layout.SEQUENCE: ((1, 1), (2, 7), (3, 16)),
    Layout.PLANE_1D: ((1, 1), (2, 7), (3, 16)),
    Layout.PLANE_2D: ((1, 1, 1), (2, 5, 3), (3, 8, 8)),
}
_CHANNELS_FIRST_TOKENS = ((1,), (2, 5), (2, 3, 4))


@dataclass(frozen=True)
class _Case:
    """One comparison.

    Attributes:
        leading: Sizes of the axes other than the features.
        draw: Seed of the random numbers.
    """

    leading: tuple[int, ...]
    draw: int


@dataclass(frozen=True)
class _Outcome:
    """What one evaluation returned, in float64.

    Attributes:
        y: The host's output with the seed's added.
        gradients: Those of host output, slot input where it is read, and every parameter.
    """

    y: Tensor
    gradients: tuple[Tensor, ...]


class Verifier:
    """Compares one kernel with its blueprint's graph.

    The graph runs in float64 in the reference interpreter. A native kernel runs in its own element
    type in the compiled core; a kernel that runs in the interpreter does so in float32 or float64,
    because what can be wrong with it is the graph and not torch's rounding.

    Args:
        lowered: The kernel, with the mapping from its blueprint.
    """

    def __init__(self, lowered: Lowered) -> None:
        self.kernel = lowered.kernel
        self.digest = kernel_digest(lowered.kernel)
        self.computation = lowered.computation
        self.signature = lowered.kernel.signature
        self.native = lowered.kernel.WhichOneof("lowering") != "graph"
        self.channels_first = self.signature.slot_kind in CHANNEL_KINDS
        self.reads_input = self.signature.source == blueprint_pb2.SEED_SOURCE_INPUT
        own = torch_dtype(self.signature.dtype)
        self.dtype = own if self.native or own == torch.float64 else torch.float32
        self.tolerance = TOLERANCES[self.dtype]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.step = torch.finfo(wide).eps
        cuda = self.signature.device_class == kernel_pb2.DEVICE_CLASS_CUDA
        self.device = torch.device("cuda" if cuda else "cpu")

    def report(self) -> kernel_pb2.ValidationReport:
        """Returns the evidence; never raises for a kernel that is wrong."""
        leading = _LEADING[self.computation.graph.layout]
        if self.computation.graph.layout is Layout.TOKENS and self.channels_first:
            leading = _CHANNELS_FIRST_TOKENS
        failure = self._not_zero_at_birth(leading)
        forward_error = gradient_error = 0.0
        for case in (_Case(sizes, index) for index, sizes in enumerate(leading)):
            forward, gradient, stable = self._compare(case)
            forward_error = max(forward_error, forward)
            gradient_error = max(gradient_error, gradient)
            # A comparison with NaN is false, so NaN fails.
            if not (forward <= self.tolerance and gradient <= self.tolerance):
                shape = self._shape(case.leading, self.signature.source_width)
                failure = failure or (
                    f"differs from the reference for a source of shape {list(shape)}"
                    if stable
                    else f"the reference itself moves by more than the tolerance with the last bit "
                    f"of a source of shape {list(shape)}"
                )
        compared = "compiled core" if self.native else "interpreter"
        return kernel_pb2.ValidationReport(
            passed=not failure,
            num_cases=len(leading),
            forward_error=forward_error,
            gradient_error=gradient_error,
            tolerance=self.tolerance,
            detail=failure
            or f"{compared} in {self.dtype} against the blueprint's graph in float64, random "
            "parameters, gradients of source and parameters; zero at birth",
            torch_version=torch.__version__,
            esper_version=esper.__version__,
        )

    def _compare(self, case: _Case) -> tuple[float, float, bool]:
        """Returns forward error, gradient error, and whether the reference is stable there.

        Where a rectifier or maximum sits at its kink, the gradient in float64 and in the kernel's
        type may rightly differ; such a draw says nothing and is taken again.
        """
        forward = gradient = float("nan")
        for attempt in range(_MAX_DRAWS):
            generator = torch.Generator().manual_seed(case.draw + 1000 * attempt)
            weights = {spec.name: self._random(spec, generator) for spec in self.kernel.parameters}
            h = self._normal(self._shape(case.leading, self.signature.chunk_width), generator)
            x = None
            if self.reads_input:
                x = self._normal(self._shape(case.leading, self.signature.source_width), generator)
            dy = self._normal(h.shape, generator)
            reference = ReferenceModule(
                self.computation, {name: tensor.double() for name, tensor in weights.items()}
            )
            expected = self._run_reference(reference, h.double(), _double(x), dy.double())
            actual = self._run_kernel(weights, h, x, dy)
            forward = _error([actual.y], [expected.y])
            gradient = _error(actual.gradients, expected.gradients)
            if forward <= self.tolerance and gradient <= self.tolerance:
                return forward, gradient, True
            nudge = 1.0 + 4.0 * self.step
            nudged_x = None if x is None else x.double() * nudge
            nudged = self._run_reference(reference, h.double() * nudge, nudged_x, dy.double())
            moved = max(
                _error([nudged.y], [expected.y]), _error(nudged.gradients, expected.gradients)
            )
            if moved <= self.tolerance:
                return forward, gradient, True
        return forward, gradient, False

    def _not_zero_at_birth(self, leading: Sequence[tuple[int, ...]]) -> str:
        """Returns what is wrong with the newborn kernel in its own element type, or nothing."""
        generator = torch.Generator().manual_seed(0)
        own = torch_dtype(self.signature.dtype)
        weights = init_parameters(self.kernel, generator)
        for sizes in leading:
            h = torch.randn(self._shape(sizes, self.signature.chunk_width), generator=generator).to(
                own
            )
            x = None
            if self.reads_input:
                shape = self._shape(sizes, self.signature.source_width)
                x = torch.randn(shape, generator=generator).to(own)
            y = self._run_kernel(weights, h, x, torch.ones_like(h)).y
            if not torch.equal(y, h.double()):
                return "does not add exactly zero at birth"
        return ""

    def _run_reference(
        self, reference: ReferenceModule, h: Tensor, x: Tensor | None, dy: Tensor
    ) -> _Outcome:
        reference.eval()
        h.requires_grad_(True)
        if x is not None:
            x.requires_grad_(True)
        y = h + reference(h if x is None else x)
        return _differentiate(y, dy, [h, x, *reference.parameters()])

    def _run_kernel(
        self, weights: dict[str, Tensor], h: Tensor, x: Tensor | None, dy: Tensor
    ) -> _Outcome:
        place = Place("verification", 0, h.dtype, self.device)
        graft = Graft(self.kernel, self.digest, weights, place)
        graft.eval()
        parameters = graft.ordered_parameters()
        h = h.detach().to(self.device).requires_grad_(True)
        x = None if x is None else x.detach().to(self.device).requires_grad_(True)
        if graft.network is not None:
            y = h + graft.network(h if x is None else x)
        elif graft.is_noop:
            y = h.clone()
        else:
            plan = graft.plan(0, 0, self.signature.chunk_width, 0).pack()
            flat, _ = slot_forward(
                self._features_last(h),
                None if x is None else self._features_last(x),
                parameters,
                torch.ones(1, 3),
                plan,
            )
            y = flat.movedim(-1, 1) if self.channels_first else flat
        return _differentiate(y, dy.to(self.device), [h, x, *parameters])

    def _features_last(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1) if self.channels_first else tensor

    def _shape(self, leading: tuple[int, ...], width: int) -> tuple[int, ...]:
        if self.channels_first:
            return (leading[0], width, *leading[1:])
        return (*leading, width)

    def _normal(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(self.dtype)

    def _random(self, spec: kernel_pb2.ParameterSpec, generator: torch.Generator) -> Tensor:
        """Returns a parameter without zeros that keeps signals near unit variance."""
        tensor = torch.randn(tuple(spec.shape), generator=generator)
        if len(spec.shape) > 1:
            tensor = tensor / max(spec.fan_in, 1) ** 0.5
        elif spec.init == kernel_pb2.INIT_KIND_ONES:
            tensor = 1.0 + 0.5 * tensor
        return tensor.to(self.dtype)


def verify(lowered: Lowered) -> kernel_pb2.ValidationReport:
    """Returns the evidence that a kernel computes what its blueprint's graph says, or does not."""
    return Verifier(lowered).report()


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def _differentiate(y: Tensor, dy: Tensor, leaves: Iterable[Tensor | None]) -> _Outcome:
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(y, present, dy, allow_unused=True)
    return _Outcome(
        y.detach().double().cpu(),
        tuple(
            torch.zeros(leaf.shape, dtype=torch.float64) if grad is None else grad.double().cpu()
            for leaf, grad in zip(present, gradients, strict=True)
        ),
    )


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest difference relative to the largest magnitude of each reference tensor."""
    magnitudes = [float(tensor.abs().max()) for tensor in expected]
    floor = max(max(magnitudes) * _SMALLEST_SCALE, torch.finfo(torch.float64).tiny)
    errors = [
        float((a - e).abs().max()) / max(magnitude, floor)
        for a, e, magnitude in zip(actual, expected, magnitudes, strict=True)
    ]
    return float(torch.tensor(errors, dtype=torch.float64).max())
