"""How much a dormant seed could learn that the host cannot express itself.

With v = -dL/dy what the loss wants of a slot's output and phi(z) random features of what a seed
would read, ``P = sum phi v^T`` is the gradient that the seed's fan-out would receive. For a Linear
slot with input x the part of it that the host's own weight could take up is projected out by least
squares: ``R = P - Q (S + lambda I)^-1 M`` with ``S = sum x x^T``, ``M = sum x v^T`` and
``Q = sum phi x^T`` (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526). Elsewhere ``R = P``, the
virtual-seed gradient (SensLI). The same with the rows of v shuffled is the null: what noise looks
like.

Shape suffixes: N sampled rows, D features of the output, F random features, X features of the
Linear's input with a constant 1 where the layer has a bias.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.common.v1 import blueprint_pb2

MAX_ROWS = 4096
"""Most rows of a step that are looked at; more are sampled at a fixed stride."""

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
        null_score: The same under shuffled gradients.
    """

    source: blueprint_pb2.SeedSource
    score: float
    null_score: float


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
        out = targets[1] - targets[0]
        self.p_FD = torch.zeros(num_features, out, device=device)
        self.null_p_FD = torch.zeros(num_features, out, device=device)
        self.q_FX = torch.zeros(num_features, linear_width, device=device)

    def features(self, z_NZ: Tensor) -> Tensor:
        """Random ReLU features of unit root mean square, [N, F]."""
        z = z_NZ[:, self.columns[0] : self.columns[1]]
        z = z - z.mean(dim=0)
        z = z / z.square().mean().sqrt().clamp_min(1e-12)
        phi_NF = torch.relu(z @ self._omega_ZF + self._offset_F)
        return phi_NF / phi_NF.square().mean().sqrt().clamp_min(1e-12)


class GrowthProbe:
    """Accumulates the growth scores of a slot's dormant chunks.

    Args:
        dormant: Half-open column ranges of the dormant chunks by seed.
        width: D.
        source_width: Features of the slot's input; None where no seed can read it.
        linear_bias: Whether the slot's Linear has a bias; None for a slot that is no Linear.
        device: Where the slot computes.
    """

    def __init__(
        self,
        dormant: dict[int, tuple[int, int]],
        width: int,
        source_width: int | None,
        linear_bias: bool | None,
        device: torch.device,
    ) -> None:
        self.dormant = dormant
        self._constant = bool(linear_bias)
        self._reads_input = source_width is not None
        self._linear = (
            linear_bias is not None
            and source_width is not None
            and source_width <= MAX_LINEAR_WIDTH
        )
        linear_width = source_width + self._constant if self._linear and source_width else 0
        self._blocks: list[_Block] = []
        if source_width is not None:
            self._blocks.append(
                _Block(
                    blueprint_pb2.SEED_SOURCE_INPUT,
                    (0, source_width),
                    (0, width),
                    linear_width,
                    device,
                )
            )
        for bounds in dormant.values():
            self._blocks.append(
                _Block(blueprint_pb2.SEED_SOURCE_OUTPUT, bounds, bounds, linear_width, device)
            )
        self._s_XX = torch.zeros(linear_width, linear_width, device=device)
        self._m_XD = torch.zeros(linear_width, width, device=device)
        self._null_m_XD = torch.zeros(linear_width, width, device=device)
        self._shuffle = torch.Generator().manual_seed(_FEATURE_SEED)
        self._num_steps = 0
        self._last_step = -1

    def observe(self, h: Tensor, x: Tensor | None) -> "PendingScores | None":
        """Takes in what a forward shows.

        Args:
            h: The slot's own output, features last, [..., D].
            x: Its input, [..., X] with the token axes of h; None where it cannot be read.

        Returns:
            What ``PendingScores.complete`` needs once the gradient is there; None where there is
            nothing to measure.
        """
        num_rows = h.numel() // h.shape[-1]
        if num_rows == 0 or (x is None and self._reads_input):
            return None
        stride = -(-num_rows // MAX_ROWS)
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
            if not self._linear or x_NX is None:
                return PendingScores(phis, None, stride)
            if self._constant:
                x_NX = torch.nn.functional.pad(x_NX, (0, 1), value=1.0)
            self._s_XX.addmm_(x_NX.T, x_NX)
            for block, phi_NF in zip(self._blocks, phis, strict=True):
                block.q_FX.addmm_(phi_NF.T, x_NX)
            return PendingScores(phis, x_NX, stride)

    def complete(self, pending: "PendingScores", dy: Tensor, step: int) -> None:
        """Takes in the gradient that belongs to an observed forward.

        Args:
            pending: What ``observe`` returned.
            dy: dL/dy, features last, [..., D].
            step: Number of the sampled step, so that a module used twice counts once.
        """
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            # Sampled rows stand for all of them.
            v_ND = _rows(dy, pending.stride) * -float(pending.stride)
            if not bool(torch.isfinite(v_ND).all()):  # an overflowed loss scale says nothing
                return
            order = torch.randperm(len(v_ND), generator=self._shuffle).to(v_ND.device)
            null_ND = v_ND[order]
            for block, phi_NF in zip(self._blocks, pending.phis, strict=True):
                begin, end = block.targets
                block.p_FD.addmm_(phi_NF.T, v_ND[:, begin:end])
                block.null_p_FD.addmm_(phi_NF.T, null_ND[:, begin:end])
            if pending.x_NX is not None:
                self._m_XD.addmm_(pending.x_NX.T, v_ND)
                self._null_m_XD.addmm_(pending.x_NX.T, null_ND)
        if step != self._last_step:
            self._last_step = step
            self._num_steps += 1

    def scores(self) -> dict[int, list[Score]]:
        """Returns the scores of every dormant seed; empty where nothing was measured."""
        if self._num_steps == 0:
            return {}
        fit_XD, null_fit_XD = self._host_fit()
        result: dict[int, list[Score]] = {seed: [] for seed in self.dormant}
        for block in self._blocks:
            scale = self._num_steps * block.p_FD.shape[0] ** 0.5
            begin, end = block.targets
            residuals = [
                p_FD.double() - block.q_FX.double() @ fit[:, begin:end]
                for p_FD, fit in ((block.p_FD, fit_XD), (block.null_p_FD, null_fit_XD))
            ]
            for seed, bounds in self._seeds_of(block):
                columns = slice(bounds[0] - begin, bounds[1] - begin)
                score, null = (float(r[:, columns].norm()) / scale for r in residuals)
                result[seed].append(Score(block.source, score, null))
        return result

    def _seeds_of(self, block: _Block) -> Iterator[tuple[int, tuple[int, int]]]:
        for seed, bounds in self.dormant.items():
            if block.source == blueprint_pb2.SEED_SOURCE_INPUT or bounds == block.targets:
                yield seed, bounds

    def _host_fit(self) -> tuple[Tensor, Tensor]:
        """(S + lambda I)^-1 M and the same for the null, each [X, D]."""
        s_XX = self._s_XX.double()
        both = torch.cat([self._m_XD, self._null_m_XD], dim=1).double()
        if len(s_XX):
            ridge = _RIDGE * s_XX.diagonal().mean().clamp_min(1e-12)
            s_XX = s_XX + ridge * torch.eye(len(s_XX), dtype=s_XX.dtype, device=s_XX.device)
            both = torch.linalg.solve(s_XX, both)
        width = self._m_XD.shape[1]
        return both[:, :width], both[:, width:]


@dataclass(frozen=True, slots=True)
class PendingScores:
    """What one forward leaves for its backward.

    Attributes:
        phis: Features of each block, [N, F].
        x_NX: Sampled rows of the Linear's input; None where they are not used.
        stride: Every how many rows one was sampled.
    """

    phis: Sequence[Tensor]
    x_NX: Tensor | None
    stride: int


def _rows(tensor: Tensor, stride: int) -> Tensor:
    """Sampled token rows in float32, a copy, since later layers may write in place."""
    return tensor.detach().reshape(-1, tensor.shape[-1])[::stride].float().clone()
