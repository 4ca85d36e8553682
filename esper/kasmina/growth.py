"""How much a dormant seed could learn that the host cannot express itself.

With v = -dL/dy what the loss wants of a slot's output and phi(z) random features of what a seed
would read, ``P = sum phi v^T`` is the gradient that the seed's fan-out would receive (the
virtual-seed gradient, SensLI). Where the host is linear in z, the part of P that its own weight
could take up is projected out by least squares (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526):
``R = P - (sum phi u^T) (sum u u^T + lambda I)^-1 sum u v^T``. The regressors u are not all of the
host's inputs but the pre-activations of phi: by Stein's lemma the linear part of ``phi(w . z)`` is
a multiple of ``w . z`` where z is elliptical, and projections of many features are nearly so
(Diaconis and Freedman 1984). So the moments stay small however wide the host is. The score is the
norm of R.

The null is the same norm under shuffled rows of v. It is not sampled: for centred phi_r the mean of
``||sum phi_r v^T||^2`` over all orders is ``sum ||phi_r||^2 sum ||v||^2 / (n - 1)``, so one number
a column is all that has to be kept, and the null itself has no noise.

Phi and u are centred in each step: a constant shift, which a bias can give, is no capacity.

Shape suffixes: N sampled rows, D features of the output, W of a chunk, X of the input, G groups of
features with one source each, F features of a group, B = F or 2 F basis functions (phi, then u).
"""

import math
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from esper.common.v1 import blueprint_pb2
from esper.kasmina.rows import RowSample

NUM_FEATURES = 32
"""Random features of each source."""

_RIDGE = 1e-6  # lambda over the mean diagonal of sum u u^T
_FEATURE_SEED = 0x5EED
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Score:
    """The growth score of one chunk and source.

    Attributes:
        source: What the candidate features read.
        score: Norm of the residual per sampled step and feature.
        null_score: Root mean square of the same over all orders of the gradient's rows.
        gradient_score: Norm of P, from which nothing is taken away, in the same units.
        gradient_null_score: The null of that.
    """

    source: blueprint_pb2.SeedSource
    score: float
    null_score: float
    gradient_score: float
    gradient_null_score: float


@dataclass(frozen=True, slots=True)
class PendingScores:
    """What one forward leaves for its backward.

    Attributes:
        basis_GNB: Basis functions at the sampled rows, centred.
        rows: The rows.
    """

    basis_GNB: Tensor
    rows: RowSample


@dataclass(frozen=True, slots=True)
class ProbeState:
    """What a probe has gathered; the tensors are the probe's own.

    Attributes:
        dormant: Column ranges of the chunks that it measures, by seed.
        gram_GBB: Sums of products of the basis functions.
        input_DB: Sums of their products with the gradient, for seeds that read the input.
        output_GWB: The same for seeds that read their chunk.
        energy_D: Sum of centred squares of the gradient.
        num_steps: Sampled steps, shape [].
        last_step: Number of the last one.
    """

    dormant: dict[int, tuple[int, int]]
    gram_GBB: Tensor
    input_DB: Tensor
    output_GWB: Tensor
    energy_D: Tensor
    num_steps: Tensor
    last_step: int


@dataclass(frozen=True, slots=True)
class _Features:
    """The random features of all probes of the same chunks; never written to.

    Attributes:
        input_XF: Directions in the input; None where no seed reads it.
        output_GWF: Directions in each chunk.
        offset_G1F: What is added before the activation.
        columns: Columns of the output that the chunks hold, padded to equal widths.
    """

    input_XF: Tensor | None
    output_GWF: Tensor
    offset_G1F: Tensor
    columns: Tensor


@lru_cache(maxsize=256)
def _features(
    chunks: tuple[tuple[int, int], ...], source_width: int | None, device: torch.device
) -> _Features:
    chunk_width = max(end - begin for begin, end in chunks)
    generator = torch.Generator().manual_seed(_FEATURE_SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    input_XF = None if source_width is None else draw(source_width, NUM_FEATURES)
    output_GWF = draw(len(chunks), chunk_width, NUM_FEATURES)
    # Chunks of unequal width are padded by their own last column, which is weighed with 0.
    columns: list[int] = []
    for group, (begin, end) in enumerate(chunks):
        columns += [min(column, end - 1) for column in range(begin, begin + chunk_width)]
        output_GWF[group, end - begin :] = 0.0
    num_groups = len(chunks) + (input_XF is not None)
    offset_G1F = draw(num_groups, 1, NUM_FEATURES)
    return _Features(input_XF, output_GWF, offset_G1F, torch.tensor(columns, device=device))


class GrowthProbe:
    """Accumulates the growth scores of a slot's dormant chunks.

    On the CPU the sums are made natively; elsewhere by torch, without waiting for the device.

    Args:
        dormant: Half-open column ranges of the dormant chunks by seed; their widths differ by at
            most one.
        width: D.
        source_width: Features of the slot's input; None where no seed can read it.
        linear: Whether the host is linear in what seeds read, so that its own reach is taken off.
        device: Where the slot computes.
    """

    def __init__(
        self,
        dormant: Mapping[int, tuple[int, int]],
        width: int,
        source_width: int | None,
        linear: bool,
        device: torch.device,
    ) -> None:
        self.dormant = dict(dormant)
        self._linear = linear
        self._native = device.type == "cpu"
        self._bounds = [bound for chunk in dormant.values() for bound in chunk]
        features = _features(tuple(dormant.values()), source_width, device)
        self._input_XF = features.input_XF
        self._output_GWF = features.output_GWF
        self._offset_G1F = features.offset_G1F
        self._columns = features.columns
        num_groups, chunk_width = len(self._offset_G1F), self._output_GWF.shape[1]
        num_basis = NUM_FEATURES * (2 if linear else 1)
        self._gram_GBB = torch.zeros(num_groups, num_basis, num_basis, device=device)
        self._input_DB = torch.zeros(width, num_basis, device=device)
        self._output_GWB = torch.zeros(len(dormant), chunk_width, num_basis, device=device)
        self._energy_D = torch.zeros(width, device=device)  # of centred v, n / (n - 1) each step
        self._num_steps = torch.zeros((), device=device)
        self._last_step = -1

    def state(self) -> ProbeState:
        """Returns what has been gathered."""
        return ProbeState(
            self.dormant,
            self._gram_GBB,
            self._input_DB,
            self._output_GWB,
            self._energy_D,
            self._num_steps,
            self._last_step,
        )

    def resume(self, state: ProbeState) -> None:
        """Goes on from what a probe of the same place and chunks had gathered."""
        self._gram_GBB.copy_(state.gram_GBB)
        self._input_DB.copy_(state.input_DB)
        self._output_GWB.copy_(state.output_GWB)
        self._energy_D.copy_(state.energy_D)
        self._num_steps.copy_(state.num_steps)
        self._last_step = state.last_step

    def observe(self, h_ND: Tensor, x_NX: Tensor | None, rows: RowSample) -> PendingScores | None:
        """Takes in what a forward shows; call it without gradients and autocast.

        Args:
            h_ND: Sampled rows of the slot's own output, float32.
            x_NX: The same rows of its input, float32; None where it cannot be read.
            rows: Which rows they are.

        Returns:
            What ``complete`` needs once the gradient is there; None where there is too little to
            measure.
        """
        if self._input_XF is None:
            x_NX = None
        elif x_NX is None:
            return None
        if len(h_ND) < 2:
            return None
        return PendingScores(self._basis(h_ND, x_NX), rows)

    def complete(self, pending: PendingScores, v_ND: Tensor, step: int) -> None:
        """Takes in the gradient of an observed forward; call it without gradients and autocast.

        An overflowed loss scale says nothing: what is not finite is left out.

        Args:
            pending: What ``observe`` returned.
            v_ND: Rows ``pending.rows`` of dL/dy, float32.
            step: Number of the sampled step, so that a module used twice counts once.
        """
        finite = self._accumulate(pending.basis_GNB, v_ND, pending.rows.scale)
        if step != self._last_step:
            self._last_step = step
            self._num_steps += finite

    def _basis(self, h_ND: Tensor, x_NX: Tensor | None) -> Tensor:
        """Features, and for a linear host their pre-activations, all centred, [G, N, B]."""
        if self._native:
            basis_GNB: Tensor = torch.ops.esper.growth_basis.default(
                h_ND.contiguous(),
                None if x_NX is None else x_NX.contiguous(),
                self._input_XF,
                self._output_GWF,
                self._offset_G1F,
                self._bounds,
                self._linear,
            )
            return basis_GNB
        u_GNF = torch.bmm(self._chunks(h_ND), self._output_GWF)
        if x_NX is not None and self._input_XF is not None:
            u_GNF = torch.cat([(x_NX @ self._input_XF)[None], u_GNF])
        u_GNF = _normalized(u_GNF)
        phi_GNF = _normalized(torch.relu(u_GNF + self._offset_G1F))
        return torch.cat([phi_GNF, u_GNF], dim=2) if self._linear else phi_GNF

    def _accumulate(self, basis_GNB: Tensor, v_ND: Tensor, scale: float) -> bool | Tensor:
        """Adds what one gradient gives, each row standing for ``scale``; says whether it did."""
        if self._native:
            added: bool = torch.ops.esper.growth_accumulate.default(
                basis_GNB,
                v_ND.contiguous(),
                scale,
                self._bounds,
                self._input_XF is not None,
                self._gram_GBB,
                self._input_DB,
                self._output_GWB,
                self._energy_D,
            )
            return added
        gram_GBB = torch.bmm(basis_GNB.mT, basis_GNB)
        output_GWB = torch.bmm(self._chunks(v_ND).mT, basis_GNB[-len(self.dormant) :])
        finite = torch.isfinite(v_ND.sum() + gram_GBB.sum())  # a tensor: nobody waits for it
        self._gram_GBB += gram_GBB.where(finite, 0.0)
        self._output_GWB.add_(output_GWB.where(finite, 0.0), alpha=scale)
        if self._input_XF is not None:
            input_DB = v_ND.mT @ basis_GNB[0]
            self._input_DB.add_(input_DB.where(finite, 0.0), alpha=scale)
        variance_D = torch.var(v_ND, dim=0)
        self._energy_D.add_(variance_D.where(finite, 0.0), alpha=len(v_ND) * scale**2)
        return finite

    def _chunks(self, rows_ND: Tensor) -> Tensor:
        """The dormant chunks of some rows, [G, N, W]."""
        picked = rows_ND.index_select(1, self._columns)
        return picked.view(len(rows_ND), len(self.dormant), -1).transpose(0, 1)

    def scores(self) -> dict[int, list[Score]]:
        """Returns the scores of every dormant seed; empty where nothing was measured."""
        num_steps = int(self._num_steps)
        if num_steps == 0:
            return {}
        result: dict[int, list[Score]] = {seed: [] for seed in self.dormant}
        unit = math.sqrt(NUM_FEATURES) * num_steps
        fit_GuF, shares = self._fit()
        energy_D = self._energy_D.double().cpu().numpy()
        for group, cross_DB, source, targets in self._groups():
            cross_DB = cross_DB.double()
            residual_D = _square_sums(self._residual(cross_DB, fit_GuF, group))
            gradient_D = _square_sums(cross_DB[:, :NUM_FEATURES])
            for seed, (begin, end) in targets.items():
                energy = float(energy_D[slice(*self.dormant[seed])].sum())
                score = Score(
                    source=source,
                    score=math.sqrt(residual_D[begin:end].sum()) / unit,
                    null_score=math.sqrt(shares[group] * energy) / num_steps,
                    gradient_score=math.sqrt(gradient_D[begin:end].sum()) / unit,
                    gradient_null_score=math.sqrt(energy) / num_steps,
                )
                result[seed].append(score)
        return result

    def directions(self, seed: int, source: blueprint_pb2.SeedSource) -> Tensor | None:
        """Returns the directions of a seed's source that the wanted update asks for most.

        They are the left singular vectors of R, mapped back through the random features, each
        scaled by its singular value; float32 [Z, k] with k at most the chunk's width and the
        number of features.

        Args:
            seed: A dormant seed.
            source: What it would read.

        Returns:
            The directions; ``None`` where nothing was measured.
        """
        if int(self._num_steps) == 0:
            return None
        for group, cross_DB, group_source, targets in self._groups():
            if group_source != source or seed not in targets:
                continue
            omega_ZF = self._input_XF
            if omega_ZF is None or source == blueprint_pb2.SEED_SOURCE_OUTPUT:
                position = list(self.dormant).index(seed)
                omega_ZF = self._output_GWF[position, : targets[seed][1]]
            residual_DF = self._residual(cross_DB.double(), self._fit()[0], group)
            chunk_WF = residual_DF[slice(*targets[seed])]
            left_Fk, values_k, _ = torch.linalg.svd(chunk_WF.T, full_matrices=False)
            directions: Tensor = omega_ZF @ (left_Fk * values_k).float()
            return directions / math.sqrt(len(omega_ZF))
        return None

    def _groups(
        self,
    ) -> Iterator[tuple[int, Tensor, blueprint_pb2.SeedSource, dict[int, tuple[int, int]]]]:
        """Each group with its sums, its source, and the rows of the sums that seeds own."""
        first_output = 0
        if self._input_XF is not None:
            yield 0, self._input_DB, blueprint_pb2.SEED_SOURCE_INPUT, self.dormant
            first_output = 1
        for position, (seed, (begin, end)) in enumerate(self.dormant.items()):
            source = blueprint_pb2.SEED_SOURCE_OUTPUT
            sums_WB = self._output_GWB[position]
            yield first_output + position, sums_WB, source, {seed: (0, end - begin)}

    def _fit(self) -> tuple[Tensor | None, list[float]]:
        """How the host explains each group's features, and the share of their energy it does not.

        Returns:
            Coefficients of the pre-activations, [G, F, F], None where the host is not linear in
            them; and the share of each group.
        """
        if not self._linear:
            return None, [1.0] * len(self._gram_GBB)
        f = NUM_FEATURES
        gram_GBB = self._gram_GBB.double()
        gram_Guu, gram_GuF = gram_GBB[:, f:, f:], gram_GBB[:, f:, :f]
        ridge_G = _RIDGE * gram_Guu.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(_TINY)
        identity = torch.eye(f, dtype=gram_Guu.dtype, device=gram_Guu.device)
        fit_GuF = torch.linalg.solve(gram_Guu + ridge_G[:, None, None] * identity, gram_GuF)
        energy_G = gram_GBB[:, :f, :f].diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min(_TINY)
        explained_G = (gram_GuF * fit_GuF).sum(dim=(1, 2))
        return fit_GuF, (1.0 - explained_G / energy_G).clamp_min(0.0).tolist()

    def _residual(self, cross_DB: Tensor, fit_GuF: Tensor | None, group: int) -> Tensor:
        """R of a group, [D, F]."""
        if fit_GuF is None:
            return cross_DB
        f = NUM_FEATURES
        return cross_DB[:, :f] - cross_DB[:, f:] @ fit_GuF[group]


def _square_sums(values_DF: Tensor) -> npt.NDArray[np.float64]:
    """Sum of squares of each row."""
    sums: npt.NDArray[np.float64] = values_DF.square().sum(dim=1).cpu().numpy()
    return sums


def _normalized(values_GNF: Tensor) -> Tensor:
    """Columns centred, and each group of unit root mean square."""
    centred_GNF = values_GNF - values_GNF.mean(dim=1, keepdim=True)
    norm_G11: Tensor = torch.linalg.vector_norm(centred_GNF, dim=(1, 2), keepdim=True)
    count = centred_GNF.shape[1] * centred_GNF.shape[2]
    scale_G11: Tensor = math.sqrt(count) / norm_G11.clamp_min(_TINY)
    return centred_GNF * scale_G11


# ---------------------------------------------------------------- tracing


def _fake_basis(
    h: Tensor,
    x: Tensor | None,
    input_omega: Tensor | None,
    output_omega: Tensor,
    offset: Tensor,
    bounds: Sequence[int],
    linear: bool,
) -> Tensor:
    groups = len(bounds) // 2 + (x is not None)
    return h.new_empty((groups, h.shape[0], NUM_FEATURES * (1 + linear)))


def _fake_accumulate(
    basis: Tensor,
    v: Tensor,
    scale: float,
    bounds: Sequence[int],
    reads_input: bool,
    gram: Tensor,
    input: Tensor,
    output: Tensor,
    energy: Tensor,
) -> bool:
    return True


torch.library.register_fake("esper::growth_basis", _fake_basis)
torch.library.register_fake("esper::growth_accumulate", _fake_accumulate)


# ---------------------------------------------------------------- counting


def _widths(bounds: Sequence[int]) -> int:
    return sum(bounds[1::2]) - sum(bounds[::2])


@register_flop_formula(torch.ops.esper.growth_basis)
def _basis_flops(
    h_shape: Sequence[int],
    x_shape: Sequence[int] | None,
    input_omega_shape: Sequence[int] | None,
    output_omega_shape: Sequence[int],
    offset_shape: Sequence[int],
    bounds: Sequence[int],
    linear: bool,
    out_shape: object = None,
) -> int:
    read = _widths(bounds) + (0 if x_shape is None else x_shape[1])
    return 2 * h_shape[0] * read * NUM_FEATURES


@register_flop_formula(torch.ops.esper.growth_accumulate)
def _accumulate_flops(
    basis_shape: Sequence[int],
    v_shape: Sequence[int],
    scale: float,
    bounds: Sequence[int],
    reads_input: bool,
    *shapes: object,
    out_shape: object = None,
) -> int:
    groups, rows, functions = basis_shape
    wanted = _widths(bounds) + v_shape[1] * reads_input
    return 2 * rows * functions * (groups * functions + wanted)
