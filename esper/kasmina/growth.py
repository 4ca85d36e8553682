"""How much a dormant seed could learn that the host cannot express itself.

With v = -dL/dy what the loss wants of a slot's output and phi(z) random features of what a seed
would read, ``P = sum phi v^T`` is the gradient that the seed's fan-out would receive. For a Linear
slot with input x the part of it that the host's own weight could take up is projected out by least
squares: ``R = P - Q (S + lambda I)^-1 M`` with ``S = sum x x^T``, ``M = sum x v^T`` and
``Q = sum phi x^T`` (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526). Elsewhere ``R = P``, the
virtual-seed gradient (SensLI). The score is the norm of R.

The null is the same norm under shuffled rows of v. It is not sampled: for centred phi_r the mean of
``||sum phi_r v^T||^2`` over all orders is ``sum ||phi_r||^2 sum ||v||^2 / (n - 1)``, so one number
a column is all that has to be kept, and the null itself has no noise.

Phi and x are centred in each step: a constant shift, which a bias can give, is no capacity.

Shape suffixes: N sampled rows, D features of the output, F random features, X features of the
Linear's input, Z features of what a seed reads.
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.common.v1 import blueprint_pb2

MAX_ROWS = 4096
"""Most rows of a step that are looked at; of more, one in so many is."""

MAX_LINEAR_WIDTH = 1024
"""Widest Linear input whose second moments are gathered."""

_MAX_FEATURES = 64
_RIDGE = 1e-4  # lambda over the mean diagonal of S
_FEATURE_SEED = 0x5EED


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
        phis: Features of each block, [N, F].
        x_NX: Sampled rows of the Linear's input, centred; None where they are not used.
        stride: Every how many rows one was sampled.
    """

    phis: Sequence[Tensor]
    x_NX: Tensor | None
    stride: int


@dataclass(frozen=True, slots=True)
class BlockState:
    """Sums of one block of a probe; the tensors are the probe's own.

    Attributes:
        p_FD: Sum of phi v^T.
        q_FX: Sum of phi x^T.
        energy: Sum of phi^2, shape [].
    """

    p_FD: Tensor
    q_FX: Tensor
    energy: Tensor


@dataclass(frozen=True, slots=True)
class ProbeState:
    """What a probe has gathered; the tensors are the probe's own.

    Attributes:
        dormant: Column ranges of the chunks that it measures, by seed.
        blocks: Sums of its blocks.
        s_XX: Sum of x x^T.
        m_XD: Sum of x v^T.
        v_energy_D: Sum of v^2.
        num_steps: Sampled steps.
        last_step: Number of the last one.
    """

    dormant: dict[int, tuple[int, int]]
    blocks: list[BlockState]
    s_XX: Tensor
    m_XD: Tensor
    v_energy_D: Tensor
    num_steps: int
    last_step: int


class _Block:
    """Random features of some columns of z, paired with some columns of v."""

    def __init__(
        self,
        source: blueprint_pb2.SeedSource,
        columns: tuple[int, int],
        targets: tuple[int, int],
        linear_width: int,
        device: torch.device,
    ) -> None:
        self.source = source
        self.columns = columns
        self.targets = targets
        width = columns[1] - columns[0]
        num_features = min(_MAX_FEATURES, 4 * width)
        generator = torch.Generator().manual_seed(_FEATURE_SEED)
        omega = torch.randn(width, num_features, generator=generator) / width**0.5
        offset = torch.randn(num_features, generator=generator)
        self._omega_ZF = omega.to(device)
        self._offset_F = offset.to(device)
        self.p_FD = torch.zeros(num_features, targets[1] - targets[0], device=device)
        self.q_FX = torch.zeros(num_features, linear_width, device=device)
        self.energy = torch.zeros((), device=device)  # sum of phi^2

    def features(self, z_NZ: Tensor) -> Tensor:
        """Random ReLU features, centred and of unit root mean square, [N, F]."""
        z = _centred(z_NZ[:, self.columns[0] : self.columns[1]])
        z = z / z.square().mean().sqrt().clamp_min(1e-12)
        phi_NF = _centred(torch.relu(z @ self._omega_ZF + self._offset_F))
        return phi_NF / phi_NF.square().mean().sqrt().clamp_min(1e-12)

    def to_source(self, weights_Fk: Tensor) -> Tensor:
        """Returns the directions of the source that sums of features look along, [Z, k]."""
        directions: Tensor = self._omega_ZF @ weights_Fk
        return directions


class GrowthProbe:
    """Accumulates the growth scores of a slot's dormant chunks.

    Args:
        dormant: Half-open column ranges of the dormant chunks by seed.
        width: D.
        source_width: Features of the slot's input; None where no seed can read it.
        linear: Whether the slot is a Linear, whose own reach is projected out.
        device: Where the slot computes.
    """

    def __init__(
        self,
        dormant: dict[int, tuple[int, int]],
        width: int,
        source_width: int | None,
        linear: bool,
        device: torch.device,
    ) -> None:
        self.dormant = dormant
        self._reads_input = source_width is not None
        linear_width = 0
        if linear and source_width is not None and source_width <= MAX_LINEAR_WIDTH:
            linear_width = source_width
        self._blocks: list[_Block] = []
        if source_width is not None:
            everything = (0, source_width), (0, width)
            source = blueprint_pb2.SEED_SOURCE_INPUT
            self._blocks.append(_Block(source, *everything, linear_width, device))
        for bounds in dormant.values():
            source = blueprint_pb2.SEED_SOURCE_OUTPUT
            self._blocks.append(_Block(source, bounds, bounds, linear_width, device))
        self._s_XX = torch.zeros(linear_width, linear_width, device=device)
        self._m_XD = torch.zeros(linear_width, width, device=device)
        self._v_energy_D = torch.zeros(width, device=device)  # sum over steps, n / (n - 1) each
        self._num_steps = 0
        self._last_step = -1

    def state(self) -> ProbeState:
        """Returns what has been gathered."""
        return ProbeState(
            self.dormant,
            [BlockState(block.p_FD, block.q_FX, block.energy) for block in self._blocks],
            self._s_XX,
            self._m_XD,
            self._v_energy_D,
            self._num_steps,
            self._last_step,
        )

    def resume(self, state: ProbeState) -> None:
        """Goes on from what a probe of the same place and chunks had gathered."""
        for block, sums in zip(self._blocks, state.blocks, strict=True):
            block.p_FD.copy_(sums.p_FD)
            block.q_FX.copy_(sums.q_FX)
            block.energy.copy_(sums.energy)
        self._s_XX.copy_(state.s_XX)
        self._m_XD.copy_(state.m_XD)
        self._v_energy_D.copy_(state.v_energy_D)
        self._num_steps, self._last_step = state.num_steps, state.last_step

    def observe(self, h: Tensor, x: Tensor | None) -> PendingScores | None:
        """Takes in what a forward shows.

        Args:
            h: The slot's own output, features last, [..., D].
            x: Its input, [..., X] with the token axes of h; None where it cannot be read.

        Returns:
            What ``complete`` needs once the gradient is there; None where there is too little to
            measure.
        """
        num_rows = h.numel() // h.shape[-1]
        stride = -(-num_rows // MAX_ROWS)
        if num_rows < 2 or (x is None and self._reads_input):
            return None
        with torch.no_grad(), torch.autocast(h.device.type, enabled=False):
            h_ND = _rows(h, stride)
            x_NX = None if x is None else _rows(x, stride)
            sources = {
                blueprint_pb2.SEED_SOURCE_INPUT: x_NX,
                blueprint_pb2.SEED_SOURCE_OUTPUT: h_ND,
            }
            phis = []
            for block in self._blocks:
                z_NZ = sources[block.source]
                assert z_NZ is not None
                phis.append(block.features(z_NZ))
                block.energy += phis[-1].square().sum()
            if len(self._s_XX) == 0 or x_NX is None:
                return PendingScores(phis, None, stride)
            x_NX = _centred(x_NX)
            self._s_XX.addmm_(x_NX.T, x_NX)
            for block, phi_NF in zip(self._blocks, phis, strict=True):
                block.q_FX.addmm_(phi_NF.T, x_NX)
            return PendingScores(phis, x_NX, stride)

    def complete(self, pending: PendingScores, dy: Tensor, step: int) -> None:
        """Takes in the gradient that belongs to an observed forward.

        Args:
            pending: What ``observe`` returned.
            dy: dL/dy, features last, [..., D].
            step: Number of the sampled step, so that a module used twice counts once.
        """
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            # Sampled rows stand for all of them.
            v_ND = _centred(_rows(dy, pending.stride) * -float(pending.stride))
            energy_D = v_ND.square().sum(dim=0) * (len(v_ND) / (len(v_ND) - 1))
            if not math.isfinite(energy_D.sum().item()):  # an overflowed loss scale says nothing
                return
            for block, phi_NF in zip(self._blocks, pending.phis, strict=True):
                begin, end = block.targets
                block.p_FD.addmm_(phi_NF.T, v_ND[:, begin:end])
            if pending.x_NX is not None:
                self._m_XD.addmm_(pending.x_NX.T, v_ND)
            self._v_energy_D += energy_D
        if step != self._last_step:
            self._last_step = step
            self._num_steps += 1

    def scores(self) -> dict[int, list[Score]]:
        """Returns the scores of every dormant seed; empty where nothing was measured."""
        if self._num_steps == 0:
            return {}
        result: dict[int, list[Score]] = {seed: [] for seed in self.dormant}
        for block in self._blocks:
            r_FD, share = self._residual(block)
            begin, _ = block.targets
            unit = r_FD.shape[0] ** 0.5 * self._num_steps
            for seed, bounds in self._seeds_of(block):
                chunk = slice(bounds[0] - begin, bounds[1] - begin)
                energy = self._v_energy_D[bounds[0] : bounds[1]].double().sum().item()
                score = Score(
                    source=block.source,
                    score=r_FD[:, chunk].norm().item() / unit,
                    null_score=(share * energy) ** 0.5 / self._num_steps,
                    gradient_score=block.p_FD[:, chunk].double().norm().item() / unit,
                    gradient_null_score=energy**0.5 / self._num_steps,
                )
                result[seed].append(score)
        return result

    def directions(self, seed: int, source: blueprint_pb2.SeedSource) -> Tensor | None:
        """Returns the directions of a seed's source that the wanted update asks for most.

        They are the left singular vectors of R, mapped back through the random features, each
        scaled by its singular value; float32 [Z, k] with k at most the chunk's width.

        Args:
            seed: A dormant seed.
            source: What it would read.

        Returns:
            The directions; ``None`` where nothing was measured.
        """
        for block in self._blocks:
            for index, bounds in self._seeds_of(block):
                if (index, block.source) == (seed, source) and self._num_steps > 0:
                    begin, _ = block.targets
                    r_FD, _ = self._residual(block)
                    chunk = r_FD[:, bounds[0] - begin : bounds[1] - begin]
                    left_Fk, values_k, _ = torch.linalg.svd(chunk, full_matrices=False)
                    directions: Tensor = block.to_source(left_Fk.float()) * values_k.float()
                    return directions
        return None

    def _residual(self, block: _Block) -> tuple[Tensor, float]:
        """Returns R in float64 and the share of the features' energy outside the host's input."""
        s_XX, q_FX = self._s_XX.double(), block.q_FX.double()
        begin, end = block.targets
        p_FD = block.p_FD.double()
        if len(s_XX) == 0:
            return p_FD, 1.0
        ridge = _RIDGE * s_XX.diagonal().mean().clamp_min(1e-12)
        s_XX = s_XX + ridge * torch.eye(len(s_XX), dtype=s_XX.dtype, device=s_XX.device)
        fit_XF = torch.linalg.solve(s_XX, q_FX.T)
        r_FD = p_FD - fit_XF.T @ self._m_XD[:, begin:end].double()
        explained = (2.0 * (q_FX * fit_XF.T).sum() - (fit_XF * (s_XX @ fit_XF)).sum()).item()
        return r_FD, max(0.0, 1.0 - explained / max(block.energy.item(), 1e-12))

    def _seeds_of(self, block: _Block) -> Iterator[tuple[int, tuple[int, int]]]:
        for seed, bounds in self.dormant.items():
            if block.source == blueprint_pb2.SEED_SOURCE_INPUT or bounds == block.targets:
                yield seed, bounds


def _rows(tensor: Tensor, stride: int) -> Tensor:
    """Sampled token rows in float32.

    They may share memory with the model, where later layers may write in place: use them at once.
    """
    return tensor.detach().reshape(-1, tensor.shape[-1])[::stride].float()


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=0)
