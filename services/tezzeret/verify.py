"""Compares a kernel with what its blueprint says: forward, gradients, and zero at birth."""

import functools
import math
from collections.abc import Mapping
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
from esper.kasmina.prepared import PreparedKernel

# Half types accumulate in float32, so only the rounding of operands and results counts there; the
# others round in every step of sums over tokens and features.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}
# A tensor whose reference is smaller than this part of the largest one is measured against that
# part, as one that is 0 but for rounding has no relative error.
_SMALLEST_SCALE = 1e-3
_MAX_DRAWS = 8
_NUDGES = 3
_NUDGE_BITS = 16.0

_LEADING = {
    Layout.TOKENS: ((1,), (5,), (2, 17)),
    Layout.SEQUENCE: ((1, 1), (2, 7), (3, 16)),
    Layout.PLANE_1D: ((1, 1), (2, 7), (3, 16)),
    Layout.PLANE_2D: ((1, 1, 1), (2, 5, 3), (3, 8, 8)),
}
_CHANNELS_FIRST_TOKENS = ((1,), (2, 5), (2, 3, 4))


# What one evaluation returned, in float64: the output `y` with the seed's part added, and the
# gradients of host output `h`, slot input `x` where it is read, and every parameter by name.
_Outcome = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Comparison:
    """How far two outcomes are apart.

    Attributes:
        differences: Largest absolute difference by name.
        magnitudes: Largest magnitude of the reference by name.
    """

    differences: Mapping[str, float]
    magnitudes: Mapping[str, float]

    def errors(self) -> dict[str, float]:
        """Returns the largest differences relative to the largest magnitudes."""
        floor = _SMALLEST_SCALE * max(self.magnitudes.values()) or 1.0
        return {
            name: difference / max(self.magnitudes[name], floor)
            for name, difference in self.differences.items()
        }

    def within(self, tolerance: float) -> bool:
        """Whether every error is; NaN is not."""
        return all(error <= tolerance for error in self.errors().values())

    def with_case(self, other: "_Comparison") -> "_Comparison":
        """Returns both cases as one, so that a small case is measured against the larger ones."""
        return _Comparison(
            _worse(self.differences, other.differences), _worse(self.magnitudes, other.magnitudes)
        )


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
        self.eps = torch.finfo(wide).eps
        cuda = self.signature.device_class == kernel_pb2.DEVICE_CLASS_CUDA
        self.device = torch.device("cuda" if cuda else "cpu")

    def report(self) -> kernel_pb2.ValidationReport:
        """Returns the evidence; never raises for a kernel that is wrong."""
        leading = _LEADING[self.computation.graph.layout]
        if self.computation.graph.layout is Layout.TOKENS and self.channels_first:
            leading = _CHANNELS_FIRST_TOKENS
        failure = self._not_zero_at_birth(leading)
        cases = [self._compare(sizes, draw) for draw, sizes in enumerate(leading)]
        errors = functools.reduce(_Comparison.with_case, cases).errors()
        forward_error = errors.pop("y")
        worst = functools.reduce(lambda a, b: b if _is_worse(errors[b], errors[a]) else a, errors)
        for name, error in (("gradient of " + worst, errors[worst]), ("output", forward_error)):
            if not error <= self.tolerance:
                failure = failure or f"{name} differs from the reference by {error:.2g}"
        compared = "compiled core" if self.native else "interpreter"
        return kernel_pb2.ValidationReport(
            passed=not failure,
            num_cases=len(cases),
            forward_error=forward_error,
            gradient_error=errors[worst],
            tolerance=self.tolerance,
            detail=failure
            or f"{compared} in {self.dtype} against the blueprint's graph in float64, random "
            "parameters, gradients of source and parameters; zero at birth",
            torch_version=torch.__version__,
            esper_version=esper.__version__,
        )

    def _compare(self, leading: tuple[int, ...], draw: int) -> _Comparison:
        """Compares kernel and reference for one shape.

        Where a rectifier or maximum sits at its kink, the gradient in float64 and in the kernel's
        type may rightly differ; such a draw says nothing and is taken again. It is known by the
        reference's own gradient, which jumps when the source moves by a few last bits.
        """
        comparison = None
        for attempt in range(_MAX_DRAWS):
            generator = torch.Generator().manual_seed(draw + 1000 * attempt)
            weights = {spec.name: self._random(spec, generator) for spec in self.kernel.parameters}
            h = self._normal(self._shape(leading, self.signature.chunk_width), generator)
            x = None
            if self.reads_input:
                x = self._normal(self._shape(leading, self.signature.source_width), generator)
            dy = self._normal(h.shape, generator)
            reference = ReferenceModule(
                self.computation, {name: tensor.double() for name, tensor in weights.items()}
            )
            expected = self._run_reference(reference, h, x, dy)
            comparison = _compare_outcomes(self._run_kernel(weights, h, x, dy), expected)
            if comparison.within(self.tolerance):
                break
            if not self._at_kink(reference, (h, x, dy), expected, generator):
                break
        assert comparison is not None
        return comparison

    def _at_kink(
        self,
        reference: ReferenceModule,
        draw: tuple[Tensor, Tensor | None, Tensor],
        expected: _Outcome,
        generator: torch.Generator,
    ) -> bool:
        """Whether the reference itself jumps when its source moves by a few last bits."""
        h, x, dy = draw
        source = h if x is None else x
        for _ in range(_NUDGES):
            signs = torch.randn(source.shape, generator=generator).sign()
            for step in (_NUDGE_BITS * self.eps, -_NUDGE_BITS * self.eps):
                moved = source.double() * (1.0 + step * signs)
                outcome = self._run_reference(
                    reference, moved if x is None else h, None if x is None else moved, dy
                )
                if not _compare_outcomes(outcome, expected).within(self.tolerance):
                    return True
        return False

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
            y = self._run_kernel(weights, h, x, torch.ones_like(h))["y"]
            if not torch.equal(y, h.double()):
                return "does not add exactly zero at birth"
        return ""

    def _run_reference(
        self, reference: ReferenceModule, h: Tensor, x: Tensor | None, dy: Tensor
    ) -> _Outcome:
        reference.eval()
        h = h.double().requires_grad_(True)
        x = None if x is None else x.double().requires_grad_(True)
        y = h + reference(h if x is None else x)
        return _differentiate(y, dy.double(), h, x, dict(reference.named_parameters()))

    def _run_kernel(
        self, weights: dict[str, Tensor], h: Tensor, x: Tensor | None, dy: Tensor
    ) -> _Outcome:
        place = Place("verification", 0, h.dtype, self.device)
        prepared = PreparedKernel.of(self.kernel, self.digest)
        graft = Graft(prepared, weights, place)
        graft.eval()
        parameters = graft.ordered_parameters()
        named = dict(zip(weights, parameters, strict=True))
        h = h.detach().to(self.device).requires_grad_(True)
        x = None if x is None else x.detach().to(self.device).requires_grad_(True)
        plan = prepared.record(offset=0)
        if graft.network is not None:
            y = h + graft.network(h if x is None else x)
        elif plan is None:  # a noop
            y = h.clone()
        else:
            flat, _ = slot_forward(
                self._features_last(h),
                None if x is None else self._features_last(x),
                parameters,
                torch.ones(1, 3),
                plan,
            )
            y = flat.movedim(-1, 1) if self.channels_first else flat
        return _differentiate(y, dy.to(self.device), h, x, named)

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


def _differentiate(
    y: Tensor, dy: Tensor, h: Tensor, x: Tensor | None, parameters: Mapping[str, Tensor]
) -> _Outcome:
    leaves = {"h": h} | ({} if x is None else {"x": x}) | dict(parameters)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    outcome = {"y": y.detach().double().cpu()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        present = torch.zeros_like(leaf) if gradient is None else gradient
        outcome[name] = present.detach().double().cpu()
    return outcome


def _compare_outcomes(actual: _Outcome, expected: _Outcome) -> _Comparison:
    return _Comparison(
        {name: float((actual[name] - expected[name]).abs().max()) for name in expected},
        {name: float(tensor.abs().max()) for name, tensor in expected.items()},
    )


def _worse(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {
        name: second[name] if _is_worse(second[name], value) else value
        for name, value in first.items()
    }


def _is_worse(a: float, b: float) -> bool:
    """Whether a is larger than b; NaN is larger than everything."""
    return math.isnan(a) or a > b
