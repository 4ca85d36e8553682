"""A slot: the forward hook on one module of the host that runs the slot's seeds."""

from array import array
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch import nn
from torch.utils.hooks import RemovableHandle

from esper import _C
from esper.blueprints import ReferenceModule
from esper.common.v1 import kernel_pb2
from esper.kasmina.drift import DriftMeter
from esper.kasmina.grafts import Graft
from esper.kasmina.growth import GrowthProbe
from esper.kasmina.inlets import Inlet
from esper.kasmina.lifecycle import SeedLifecycleState
from esper.kasmina.ops import PLAN_WIDTH
from esper.kasmina.outputs import features_last
from esper.kasmina.outputs import find_tensor
from esper.kasmina.outputs import replace_tensor
from esper.kasmina.outputs import restore_layout
from esper.kasmina.reference import draws
from esper.kasmina.reference import run_seed
from esper.kasmina.reference import trace_seed
from esper.kasmina.rows import SampledStep
from esper.kasmina.sites import OutputPath
from esper.kasmina.sites import Site
from esper.kasmina.sites import SlotState
from esper.kasmina.sites import block_channel_axis
from esper.kasmina.sites import chunk_bounds
from esper.kasmina.sites import is_linear
from esper.kasmina.telemetry import SlotTelemetry
from esper.kasmina.work import SlotWork

_ROW = _C.PLAN_FIELDS.index("row")
_SOURCE = _C.PLAN_FIELDS.index("source")  # 0: the output


class KasminaLayer(nn.Module):
    """The seeds of one slot, and the hook through which they act.

    The layer is called by torch as a forward hook of the slot's module; while nothing in it
    computes and nothing is sampled, the module has no hook. It belongs to a ``MorphableModel``,
    whose methods change it.

    Args:
        site: Where the slot sits.
        num_seeds: Number of its seeds.
        first_row: Row of its first seed in the bank's scalars.

    Attributes:
        name: FQN of the slot's module in the host.
        kind: Sort of slot.
        num_seeds: Number of seeds.
        channel_axis: Axis of the output's features; None where it is the last.
        width: Features of the output; None until a forward has told it.
        source_width: Features of the input that seeds read; None where no seed can read it, or not
            told yet.
        inlet: Where seeds read: the module's input, or for a bridge that of another module.
        output_axes: Number of axes of the output; None until a forward has told it.
        output_path: Where in the output the slot's tensor is, see ``SlotState``; None until a
            forward has told it.
        tokens_per_sample: Rows of the output for each sample of the batch, in the forward observed
            last; None before.
        bounds: Half-open feature range of each seed's chunk; empty until the width is known.
        grafts: The planted kernels by seed.
        planted: The same, found faster.
        telemetry: What the slot has shown; None until the width is known.
        direct_gradients: Whether backward accumulates the seeds' gradients itself, see the model.
        drift: Measures how far the host's output moves; None unless a seed's ramp asks for it.
        calls: How often the slot ran.
        missed_steps: Training forwards in which seeds should have computed and did not.
    """

    def __init__(self, site: Site, num_seeds: int, first_row: int) -> None:
        super().__init__()
        self.name = site.name
        self.kind = site.kind
        self.num_seeds = num_seeds
        self.channel_axis = site.channel_axis
        self.source_width = site.source_width
        self.width: int | None = None
        self.output_axes: int | None = None
        self.output_path: OutputPath | None = None
        self.tokens_per_sample: float | None = None
        self.bounds: tuple[tuple[int, int], ...] = ()
        self.grafts = nn.ModuleDict()
        self.planted: dict[int, Graft] = {}
        self._interpreted: list[int] = []  # seeds whose kernel is a graph
        self.telemetry: SlotTelemetry | None = None
        self.direct_gradients = False
        self.drift: DriftMeter | None = None
        self.calls = 0
        self.missed_steps = 0
        self._site = (site.module,)  # in a tuple: the host owns its modules, the layer does not
        self.inlet = Inlet(site)
        self._first_row = first_row
        self._scalars = torch.zeros(0, 3)
        self._seen_dtype: torch.dtype | None = None
        self._seen_device: torch.device | None = None
        self._states = [SeedLifecycleState.DORMANT] * num_seeds
        self._work = SlotWork()
        self._handle: RemovableHandle | None = None
        self._sampled_step: SampledStep | None = None
        self._num_rows = 0  # of the forward that runs
        if site.width is not None:
            self._set_width(site.width)

    # ---------------------------------------------------------------- what the slot is

    @property
    def module(self) -> nn.Module:
        """The host's module that the slot sits on."""
        return self._site[0]

    @property
    def computes(self) -> bool:
        """Whether a seed here has work in every forward."""
        return bool(self._work.native or self._work.graphs)

    @property
    def structure(self) -> str:
        """Which seeds compute here, and what; equal while only their scalars change."""
        plan = array("q", self._work.plan).tobytes().decode("latin-1")  # as text much slower
        return f"{self.name}: {plan} {self._work.graphs}"

    @property
    def hooked(self) -> bool:
        """Whether the slot's module has the hook now."""
        return self._handle is not None

    @property
    def dtype(self) -> torch.dtype | None:
        """Element type of the slot's parameters, else of the output seen last; None if unknown."""
        return self.placement[0]

    @property
    def device(self) -> torch.device | None:
        """Where the slot computes; None if unknown."""
        return self.placement[1]

    @property
    def placement(self) -> tuple[torch.dtype | None, torch.device | None]:
        """``dtype`` and ``device``, looked up once."""
        device = None
        for parameter in self.module.parameters():
            device = parameter.device if device is None else device
            if parameter.is_floating_point():
                return parameter.dtype, device
        return self._seen_dtype, self._seen_device if device is None else device

    def graft(self, seed: int) -> Graft | None:
        """Returns what is planted in a seed."""
        return self.planted.get(seed)

    def extra_repr(self) -> str:
        """Says where the slot sits."""
        kind = kernel_pb2.SlotKind.Name(self.kind).removeprefix("SLOT_KIND_").lower()
        return f"{self.name}, {kind}, width={self.width}, num_seeds={self.num_seeds}"

    def slot_state(self) -> SlotState:
        """Returns what the slot has learnt of itself."""
        return SlotState(
            kind=self.kind,
            width=self.width,
            source_width=self.source_width,
            channel_axis=self.channel_axis,
            output_axes=self.output_axes,
            output_path=self.output_path,
            entry=self.inlet.name,
        )

    # ---------------------------------------------------------------- what changes it

    def adopt(self, state: SlotState) -> None:
        """Takes over what a slot of the same place has learnt.

        Args:
            state: What ``slot_state`` returned there.

        Raises:
            ValueError: If the slot has fewer features than seeds; nothing has changed.
        """
        self._set_width(state.width)
        self.kind = state.kind
        self.source_width = state.source_width
        self.channel_axis = state.channel_axis
        self.output_axes = state.output_axes
        self.output_path = state.output_path

    def assume(self, dtype: torch.dtype, device: torch.device) -> None:
        """Says what a slot without parameters computes in, until its first forward does."""
        if self._seen_dtype is None:
            self._seen_dtype, self._seen_device = dtype, device

    def _set_width(self, width: int | None) -> None:
        if width is not None and self.num_seeds > width:
            raise ValueError(
                f"seeds_per_layer is {self.num_seeds}, but slot {self.name!r} has {width} features "
                "and every seed must own at least one"
            )
        self.width = width
        self.bounds = () if width is None else chunk_bounds(width, self.num_seeds)
        self.telemetry = None if width is None else SlotTelemetry(self.bounds)

    def bind(self, scalars: Tensor) -> None:
        """Points the layer at its model's bank; done before the first forward.

        Args:
            scalars: alpha_fwd, alpha_bwd, gamma of all the model's seeds, float32 [seeds, 3] on the
                CPU; the bank's own memory.
        """
        self._scalars = scalars

    def plant(self, seed: int, graft: Graft) -> None:
        """Puts a graft into an empty seed."""
        self.planted[seed] = graft
        if graft.network is not None:
            self._interpreted = sorted([*self._interpreted, seed])
        self.grafts[str(seed)] = graft
        # Parameters come in the order of the seeds, however old each is: whoever sums over them
        # (to clip gradients, say) gets the same sum after a restart.
        for later in sorted(number for number in self.planted if number > seed):
            self.grafts[str(later)] = self.grafts.pop(str(later))

    def remove(self, seed: int) -> None:
        """Drops what is planted in a seed."""
        del self.grafts[str(seed)], self.planted[seed]
        if seed in self._interpreted:
            self._interpreted.remove(seed)
        if self.telemetry is not None:
            self.telemetry.forget(seed)

    def note(self, seed: int, state: SeedLifecycleState) -> None:
        """Takes in a seed's new state; ``switch`` follows where other seeds compute in it."""
        self._states[seed] = state

    def switch(self, plan: list[int]) -> None:
        """Lets the slot compute another plan from the next forward on.

        Args:
            plan: The plan of the seeds that compute now, as the bank gives it.
        """
        work, planted, first_row = self._work, self.planted, self._first_row
        work.replan(plan)
        work.native = [row - first_row for row in plan[_ROW::PLAN_WIDTH]]
        work.grafts = [planted[seed] for seed in work.native]
        work.graphs = [seed for seed in self._interpreted if self._states[seed].computes]
        work.reads_input = any(plan[_SOURCE::PLAN_WIDTH]) or any(
            planted[seed].reads_input for seed in work.graphs
        )
        self._update_hook()

    def watch_drift(self, wanted: bool) -> None:
        """Measures the drift of the host's output from the next training forward on, or no more."""
        if not wanted:
            self.drift = None
        elif self.drift is None:
            assert self.width is not None
            self.drift = DriftMeter(self.width, self.device)

    def begin_observation(self, sampled_step: SampledStep | None) -> None:
        """Lets the coming forward be seen, so that the slot learns its shape.

        Args:
            sampled_step: The forward where telemetry is sampled; None where it is not.
        """
        self._sampled_step = sampled_step
        self._num_rows = 0
        self._update_hook(wanted=True)

    def end_observation(self, num_samples: int | None) -> None:
        """Ends it; an idle slot loses its hook again.

        Args:
            num_samples: Samples of the forward's batch; None where it failed or has none.
        """
        if num_samples and self._num_rows:
            self.tokens_per_sample = self._num_rows / num_samples
        self._sampled_step = None
        self._update_hook()

    def detach(self) -> None:
        """Removes the hook for good."""
        self.inlet.detach()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _update_hook(self, wanted: bool = False) -> None:
        if not (wanted or self.computes):
            self.detach()
        elif self._handle is None:
            self.inlet.attach()
            self._handle = self.module.register_forward_hook(self, with_kwargs=True)

    # ---------------------------------------------------------------- the hot path

    def forward(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        output: object,
    ) -> object:
        """Adds the seeds to what the slot's module returned.

        Args:
            module: The slot's module.
            args: Its positional inputs.
            kwargs: Its keyword inputs.
            output: What it returned; the first floating-point tensor in it is the host's h.

        Returns:
            The output with h replaced by y, or None (torch keeps the output) where nothing acts.

        Raises:
            ValueError: If there is no h, or it has another width than before.
        """
        found = find_tensor(output)
        if found is None:
            raise ValueError(f"slot {self.name!r}: the output holds no floating-point tensor")
        path, host = found
        if host.is_nested:
            raise ValueError(
                f"slot {self.name!r}: the output is a nested tensor, which seeds cannot work on; "
                "call the wrapped model instead of its host, or turn the fast path off by "
                "torch.backends.mha.set_fastpath_enabled(False)"
            )
        # A traced graph must not depend on counters; those of dropout's draws alone are kept.
        traced = torch.compiler.is_compiling()
        if not traced or any(draws(network) for network in self._networks()):
            self.calls += 1
        sampled = self._sampled_step is not None
        x = self.inlet.take(args, kwargs)
        if self.output_axes is None:
            self._learn(host, path, x)
        h = features_last(host, self.channel_axis)
        if h.shape[-1] != self.width:
            raise ValueError(
                f"slot {self.name!r}: the output has {h.shape[-1]} features, but must have "
                f"{self.width}"
            )
        if not traced:
            self._num_rows += h.numel() // h.shape[-1]
        if self.drift is not None and self.training and torch.is_grad_enabled():
            self.drift.take(h)
        if x is not None:
            x = self._aligned_input(x, host, h) if self._work.reads_input or sampled else None
        y, stats = self._blend(h, x, sampled)
        result = host if y is h else restore_layout(y, host, self.channel_axis)
        if sampled:
            self._observe(h, x, result, stats)
        return None if y is h else replace_tensor(output, path, result)

    def _aligned_input(self, x: Tensor, host: Tensor, h: Tensor) -> Tensor | None:
        """The input with features last; None unless it has the output's tokens."""
        if self.channel_axis is not None:
            if x.dim() != host.dim():
                return None
            x = features_last(x, self.channel_axis)
        return x if x.dim() > 0 and x.shape[:-1] == h.shape[:-1] else None

    def _learn(self, host: Tensor, path: OutputPath, x: Tensor | None) -> None:
        """Takes from the first forward what the module itself does not tell."""
        if self.width is None and self.kind == kernel_pb2.SLOT_KIND_BLOCK:
            self.channel_axis = block_channel_axis(self.module, host.dim())
            if self.channel_axis is not None:
                self.kind = kernel_pb2.SLOT_KIND_CONV
        h = features_last(host, self.channel_axis)
        if self.width is None:
            self._set_width(h.shape[-1])
        if self.source_width is None and x is not None:
            aligned = self._aligned_input(x, host, h)
            self.source_width = None if aligned is None else aligned.shape[-1]
        self.output_axes, self.output_path = host.dim(), path
        self._seen_dtype, self._seen_device = host.dtype, host.device

    def _blend(self, h: Tensor, x: Tensor | None, measure: bool) -> tuple[Tensor, Tensor | None]:
        """Runs the computing seeds; returns y and the native seeds' statistics.

        Args:
            h: The host's output, features last, [..., D].
            x: The slot's input, [..., C], where a seed reads it or it is measured.
            measure: Whether to measure.
        """
        y, stats = h, None
        if self.computes and self._work.reads_input and x is None:
            raise ValueError(
                f"slot {self.name!r}: a seed reads the input of {self.inlet.name or self.name!r}, "
                "but this call has no floating-point input there with the tokens of the output"
            )
        if self._work.native:
            source = x if self._work.reads_input else None
            y, stats = self._work.run(h, source, self._scalars, measure, self.direct_gradients)
        for seed in self._work.graphs:
            y = self._run_graph(seed, y, h, x, measure)
        return y, stats

    def _networks(self) -> list[ReferenceModule]:
        """The seeds that compute in the interpreter."""
        grafts = [self.graft(seed) for seed in self._work.graphs]
        return [
            graft.network for graft in grafts if graft is not None and graft.network is not None
        ]

    def _run_graph(
        self, seed: int, y: Tensor, h: Tensor, x: Tensor | None, measure: bool
    ) -> Tensor:
        graft = self.graft(seed)
        assert graft is not None and graft.network is not None and self.telemetry is not None
        begin, end = self.bounds[seed]
        source = x if graft.reads_input else h[..., begin:end]
        assert source is not None
        scalars = self._scalars[self._first_row + seed]
        if torch.compiler.is_compiling() and not draws(graft.network):
            return trace_seed(graft.network, y, source, begin, scalars)
        alpha_fwd, alpha_bwd, gamma = scalars.tolist()
        y, energy = run_seed(
            graft.network,
            y,
            source,
            begin,
            (alpha_fwd, alpha_bwd, gamma),
            graft.draw_seed + self.calls,
            measure=measure,
        )
        if energy is not None:
            self.telemetry.add_energy(seed, energy)
        return y

    # ---------------------------------------------------------------- telemetry

    def _observe(self, h: Tensor, x: Tensor | None, result: Tensor, stats: Tensor | None) -> None:
        """Measures one sampled forward; looks at tensors only, changes none.

        Args:
            h: The host's output, features last.
            x: The slot's input, features last; None where no seed could read it.
            result: What the slot returns, in the host's own layout.
            stats: Statistics of the native seeds.
        """
        telemetry, step = self.telemetry, self._sampled_step
        assert telemetry is not None and step is not None
        if stats is not None:
            telemetry.add_stats(self._work.native, stats)
        for seed, graft in sorted(self.planted.items()):
            if self._states[seed].computes:
                telemetry.mark_computed(seed)
                if self._scalars[self._first_row + seed, 1] != 0:
                    telemetry.watch_weights(seed, graft.parameters())
        native = self._work.native
        idle = tuple(seed for seed in range(self.num_seeds) if not native or seed not in native)
        self._prepare_probe(telemetry, h.device, wanted=result.requires_grad)
        readable = x if self.source_width is not None else None
        observation = telemetry.observe(step, h, readable, idle)
        if observation is not None and result.requires_grad:
            result.register_hook(partial(observation.take_gradient, self.channel_axis))

    def _prepare_probe(self, telemetry: SlotTelemetry, device: torch.device, wanted: bool) -> None:
        """Gives the slot a probe for the seeds that are dormant now, or none."""
        dormant = {
            seed: self.bounds[seed]
            for seed, state in enumerate(self._states)
            if wanted and state == SeedLifecycleState.DORMANT
        }
        if not dormant:
            telemetry.growth = None
        elif telemetry.growth is None or telemetry.growth.dormant != dormant:
            telemetry.growth = self.new_probe(dormant, device)

    def new_probe(self, dormant: dict[int, tuple[int, int]], device: torch.device) -> GrowthProbe:
        """Returns an empty growth probe.

        Args:
            dormant: Half-open column ranges of the chunks to measure, by seed.
            device: Where the slot computes.
        """
        assert self.width is not None
        # The last module of a bridge does not see what its seeds read.
        linear = is_linear(self.module) and self.inlet.name is None
        return GrowthProbe(dormant, self.width, self.source_width, linear, device)
