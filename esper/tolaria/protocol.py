"""The graft protocol: brings live seeds from germination to their verdict, exact to the step.

Tamiyo decides what to germinate, where and when. From then on the seed's way is fixed by its plan
and runs here, in the training process: isolated warm-up, alpha ramp, settling, held-out trial. So
a plane that dies in the middle of a graft changes no live seed.
"""

import logging
from collections.abc import Mapping
from collections.abc import Sequence

from torch import Tensor
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from esper.blueprints.digest import kernel_digest
from esper.common.sharding import is_part
from esper.common.v1 import kernel_pb2
from esper.config import GraftConfig
from esper.kasmina import MorphableModel
from esper.kasmina import SeedLifecycleState
from esper.kasmina import Transition
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria.evaluation import Trial
from esper.tolaria.live_grafts import LiveGraft
from esper.tolaria.live_grafts import LiveGraftState
from esper.tolaria.live_grafts import SeedKey
from esper.tolaria.optimizer_state import OptimizerState
from esper.tolaria.optimizers import NewbornOptimizer
from esper.tolaria.optimizers import find_home
from esper.tolaria.optimizers import forget
from esper.tolaria.plans import check_plan
from esper.tolaria.plans import complete_plan
from esper.tolaria.plans import rest_of_ramp
from esper.tolaria.ranks import ALONE
from esper.tolaria.ranks import Ranks

_log = logging.getLogger("esper")

State = SeedLifecycleState

_ENDED = (State.FOSSILIZED, State.CULLED, State.CANCELLED, State.ROLLED_BACK)
BLENDED = (State.GRAFTING, State.STABILIZATION, State.EVALUATING, State.FINE_TUNING)
"""States in which a seed acts on the host and has no verdict yet."""


class GraftProtocol:
    """All live grafts of one model.

    Args:
        model: The growing model.
        optimizer: The user's optimizer, or all of them; the first one's steps are the run's.
        config: Defaults for plans and what follows the trial.
        scaler: Scaler of the user's loss; ``None`` where there is none.
        ranks: The processes that train the model together, each with seeds of its own copy: their
            gradients are averaged here, whatever the host's are averaged by.
    """

    def __init__(
        self,
        model: MorphableModel,
        optimizer: Optimizer | Sequence[Optimizer],
        config: GraftConfig,
        scaler: GradScaler | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.live: dict[SeedKey, LiveGraft] = {}
        self._fossils: dict[SeedKey, NewbornOptimizer] = {}  # in a run of several processes
        self._ranks = ranks
        self._model = model
        self._optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        self._scaler = scaler
        self._config = config
        self._warned = False  # that newborns are not clipped
        model.observers.append(self._on_transition)

    def close(self) -> None:
        """Lets go of the model."""
        self._model.observers.remove(self._on_transition)
        self._release_fossils()

    def _release_fossils(self) -> None:
        for fossil in self._fossils.values():
            fossil.close()
        self._fossils.clear()

    def _on_transition(self, transition: Transition) -> None:
        key = transition.slot, transition.seed
        if transition.before is State.FOSSILIZED and key in self._fossils:
            self._fossils.pop(key).close()
        graft = self.live.get(key)
        if graft is None:
            return
        graft.stage_steps = 0
        if transition.after in _ENDED:
            del self.live[graft.key]

    def germinate(
        self,
        slot: str,
        seed: int,
        kernel_name: str,
        kernel: kernel_pb2.Kernel,
        weights: Mapping[str, Tensor] | None,
        plan: controller_pb2.GraftPlan,
        reason: str,
    ) -> None:
        """Plants a kernel; it begins to train at the next step boundary.

        Raises:
            ValueError: If the plan breaks a rule, the seed is not dormant, or kernel or optimizer
                do not fit. No seed is left planted then.
        """
        check_plan(plan)
        self._model.load_kernel(slot, seed, kernel, weights, reason=reason)
        try:
            self._model.set_schedule(slot, seed, plan.alpha)
            optimizer = self._newborn_optimizer(slot, seed, plan)
        except ValueError as error:
            self._model.unload_kernel(slot, seed, reason=str(error))
            raise
        graft = LiveGraft(slot, seed, kernel_name, kernel, plan, optimizer)
        self.live[graft.key] = graft

    def adopt(self) -> list[SeedKey]:
        """Takes over the seeds under way that others have planted, such as those of a loaded model.

        Each goes on from its state by a plan of the configured defaults, and its alpha from where
        it is. Parameters that the user's optimizers train already, made of all that the model had,
        move into the newborn's own with their state.

        Returns:
            The seeds.

        Raises:
            ValueError: If several processes train, no optimizer takes a seed's parameters, or one
                that a scaler steps would be left with none; nothing has changed then.
        """
        keys = [
            key
            for key in self._model.occupied_seeds()
            if self._model.seed_state(*key) is not State.FOSSILIZED and key not in self.live
        ]
        if keys and self._ranks.is_shared:
            slot, seed = keys[0]
            raise ValueError(
                f"{slot}[{seed}] is {self._model.seed_state(slot, seed).name}, but several "
                "processes take over no seeds under way, as DistributedDataParallel and "
                "fully_shard have taken their parameters: go on from a checkpoint by resume"
            )
        self._check_that_scaled_optimizers_keep_something(keys)
        grafts: list[LiveGraft] = []
        try:
            for key in keys:
                grafts.append(self._adopted(*key))
        except ValueError:
            for graft in grafts:
                if graft.optimizer is not None:
                    graft.optimizer.close()
            raise
        for graft in grafts:
            if graft.optimizer is not None:
                graft.optimizer.take_out()
                for optimizer in self._optimizers:
                    forget(optimizer, self._model.seed_parameters(*graft.key))
            if self._model.seed_state(*graft.key) is State.GRAFTING:
                ramp = rest_of_ramp(graft.plan, self._model.alpha(*graft.key))
                self._model.set_schedule(*graft.key, ramp)
            else:
                self._model.set_schedule(*graft.key, graft.plan.alpha)
            self.live[graft.key] = graft
        return keys

    def _check_that_scaled_optimizers_keep_something(self, keys: Sequence[SeedKey]) -> None:
        leaving = {id(p) for key in keys for p in self._model.seed_parameters(*key)}
        for optimizer in self._optimizers if self._scaler is not None else ():
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if trained <= leaving:
                raise ValueError(
                    f"optimizer is {type(optimizer).__name__} over seeds under way alone, which "
                    "move into optimizers of Esper's own, but a GradScaler steps none without "
                    "gradients: let it train a parameter of the host too"
                )

    def _adopted(self, slot: str, seed: int) -> LiveGraft:
        kernel = self._model.kernel_of(slot, seed)
        assert kernel is not None, "a seed under way holds its kernel"
        plan = complete_plan(None, self._config)
        optimizer = self._newborn_optimizer(slot, seed, plan)
        return LiveGraft(slot, seed, f"kernels/{kernel_digest(kernel)}", kernel, plan, optimizer)

    def _newborn_optimizer(
        self, slot: str, seed: int, plan: controller_pb2.GraftPlan
    ) -> NewbornOptimizer | None:
        parameters = self._model.seed_parameters(slot, seed)
        if not parameters:
            return None
        host = self._model.host_parameters(slot)
        home = find_home(self._optimizers, host, parameters)
        return self._optimizer_at(slot, seed, *home, plan.learning_rate_scale)

    def _optimizer_at(
        self,
        slot: str,
        seed: int,
        optimizer: Optimizer,
        group_index: int,
        learning_rate_scale: float = 1.0,
    ) -> NewbornOptimizer:
        parameters = self._model.seed_parameters(slot, seed)
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        host = self._model.host_parameters(slot)
        return NewbornOptimizer(
            parameters,
            optimizer,
            group_index,
            learning_rate_scale=learning_rate_scale,
            warmup_steps=self._config.warmup_steps,
            names=[names[id(parameter)] for parameter in parameters],
            # Parts of parameters do not tell by themselves whether the whole has a gradient.
            witnesses=[parameter for parameter in host if not is_part(parameter)],
            scaler=self._scaler,
            max_gradient_norm=self._config.max_gradient_norm,
        )

    def state(self, names: Mapping[nn.Parameter, str]) -> list[LiveGraftState]:
        """Returns the live grafts, oldest first; the tensors are their own.

        Args:
            names: Names of the model's parameters.
        """
        return [
            LiveGraftState(
                graft.slot,
                graft.seed,
                graft.kernel_name,
                graft.plan.SerializeToString(),
                graft.stage_steps,
                graft.trial,
                None if graft.optimizer is None else graft.optimizer.state(names),
            )
            for graft in self.live.values()
        ]

    def enter_fossils(
        self, optimizer: Optimizer, state: OptimizerState, names: Mapping[nn.Parameter, str]
    ) -> None:
        """Adds the fossils that train here to a captured state of the optimizer that they follow.

        So a state says the same whether one process trains or several.

        Args:
            optimizer: One of the user's.
            state: Its state; changed.
            names: Names of the model's parameters.
        """
        for fossil in self._fossils.values():
            if fossil.host_optimizer is optimizer:
                fossil.enter(state, names)

    def _take_fossils_back(self) -> None:
        """Takes fossils out of the user's optimizers, into which a restored state has put them."""
        owners = {
            id(parameter): key
            for key in self._model.occupied_seeds()
            if self._model.seed_state(*key) is State.FOSSILIZED
            for parameter in self._model.seed_parameters(*key)
            if not is_part(parameter)
        }
        homes: dict[SeedKey, tuple[Optimizer, int]] = {}
        for optimizer in self._optimizers:
            for index, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    if id(parameter) in owners:
                        homes[owners[id(parameter)]] = optimizer, index
        for key, home in homes.items():
            self._fossils[key] = self._optimizer_at(*key, *home)
            self._fossils[key].take_out()
            self._fossils[key].settle()

    def resume(
        self, states: Sequence[LiveGraftState], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Takes over the live grafts of a model whose seeds and optimizers have been restored.

        Args:
            states: What ``state`` returned.
            parameters: The model's parameters by name.
        """
        for graft in self.live.values():
            if graft.optimizer is not None:
                graft.optimizer.close()
        self.live.clear()
        self._release_fossils()
        if self._ranks.is_shared:
            self._take_fossils_back()
        for state in states:
            kernel = self._model.kernel_of(state.slot, state.seed)
            assert kernel is not None, "a live graft's seed holds its kernel"
            plan = controller_pb2.GraftPlan.FromString(state.plan)
            optimizer = self._newborn_optimizer(state.slot, state.seed, plan)
            if optimizer is not None and state.optimizer is not None:
                optimizer.resume(state.optimizer, parameters)
            graft = LiveGraft(
                state.slot,
                state.seed,
                state.kernel_name,
                kernel,
                plan,
                optimizer,
                state.stage_steps,
                state.trial,
            )
            self.live[graft.key] = graft

    def on_step(self, optimizer: Optimizer | None = None) -> None:
        """Trains the newborns that belong to an optimizer, right after its own step.

        A step of the first optimizer is one of the run: it moves every live seed on.

        Args:
            optimizer: The one that has stepped; ``None`` means the first.
        """
        first = self._optimizers[0]
        optimizer = optimizer if optimizer is not None else first
        if not (self.live or self._fossils):
            if optimizer is first:
                self._model.tick()
            return
        grafts = [graft.optimizer for graft in self.live.values() if graft.optimizer is not None]
        due = [o for o in (*grafts, *self._fossils.values()) if o.host_optimizer is optimizer]
        if self._ranks.is_shared:
            self._ranks.average_gradients([p for newborn in due for p in newborn.collect()])
        if not self._warned and any(newborn.misses_clipping() for newborn in due):
            self._warned = True
            _log.warning(
                "esper: the loop changes gradients before the optimizer steps, as clipping does, "
                "but newborn seeds are not clipped by it: set GraftConfig.max_gradient_norm"
            )
        for newborn in due:
            newborn.step()
        if optimizer is not first:
            return
        for graft in self.live.values():
            graft.stage_steps += 1
        for sums in self._model.drift_sums():
            self._ranks.add_up(sums)
        completed = set(self._model.tick())
        for graft in list(self.live.values()):
            self._advance(graft, ramp_complete=graft.key in completed)

    def _advance(self, graft: LiveGraft, *, ramp_complete: bool) -> None:
        plan, model, (slot, seed) = graft.plan, self._model, graft.key
        if model.seed_state(slot, seed) is State.GERMINATED:
            model.advance(slot, seed, State.TRAINING, reason="step boundary reached")
        if (
            model.seed_state(slot, seed) is State.TRAINING
            and graft.stage_steps >= plan.training_steps
        ):
            model.advance(
                slot, seed, State.GRAFTING, reason=f"{plan.training_steps} warm-up steps done"
            )
        elif model.seed_state(slot, seed) is State.GRAFTING and ramp_complete:
            model.advance(slot, seed, State.STABILIZATION, reason="alpha has reached its end")
        elif (
            model.seed_state(slot, seed) is State.FINE_TUNING
            and graft.stage_steps >= self._config.fine_tuning_steps
            and (graft.passed or self._config.probation_steps == 0)
        ):
            self._fossilize(graft, "fine-tuning done")
        if (
            model.seed_state(slot, seed) is State.STABILIZATION
            and graft.stage_steps >= plan.stabilization_steps
        ):
            model.advance(
                slot, seed, State.EVALUATING, reason=f"settled for {plan.stabilization_steps} steps"
            )

    def due_for_trial(self, *, last: bool = False) -> list[LiveGraft]:
        """Returns the grafts that wait for their held-out trial, oldest first.

        Args:
            last: Whether no other trial can follow: who is on probation then has served it.
        """
        wait = self._config.probation_steps

        def is_due(graft: LiveGraft) -> bool:
            state = self._model.seed_state(*graft.key)
            on_probation = wait > 0 and state is State.FINE_TUNING and not graft.passed
            return state is State.EVALUATING or (
                on_probation and (last or graft.stage_steps >= wait)
            )

        return [graft for graft in self.live.values() if is_due(graft)]

    def conclude(self, graft: LiveGraft, trial: Trial) -> None:
        """Carries out the verdict of a trial."""
        graft.trial = trial
        if trial.accepted:
            self.keep(graft, trial.describe())
        elif self._may_serve_probation(graft, trial):
            reason = f"on probation: {trial.describe()}"
            self._model.advance(*graft.key, State.FINE_TUNING, reason=reason)
        else:
            self._model.cull(*graft.key, reason=trial.describe())

    def _may_serve_probation(self, graft: LiveGraft, trial: Trial) -> bool:
        is_first = self._model.seed_state(*graft.key) is State.EVALUATING
        return is_first and self._config.probation_steps > 0 and trial.high > trial.price

    def keep(self, graft: LiveGraft, reason: str) -> None:
        """Moves a graft that is due for its trial on, as after a passed one."""
        is_tuned = self._model.seed_state(*graft.key) is State.FINE_TUNING  # by its probation
        if self._config.fine_tuning_steps > 0 and not is_tuned:
            self._model.advance(*graft.key, State.FINE_TUNING, reason=reason)
        else:
            self._fossilize(graft, reason)

    def _fossilize(self, graft: LiveGraft, reason: str) -> None:
        self._model.freeze_fossil(*graft.key, self._config.freeze_fossils)
        self._model.advance(*graft.key, State.FOSSILIZED, reason=reason)
        folded = self._config.fold_fossils and self._fold(graft)
        if graft.optimizer is None:
            return
        if folded:
            graft.optimizer.close()
        elif self._ranks.is_shared:
            graft.optimizer.settle()
            self._fossils[graft.key] = graft.optimizer
        else:
            graft.optimizer.graduate()

    def _fold(self, graft: LiveGraft) -> bool:
        """Makes a fossil part of its module's weight; returns whether that was possible."""
        try:
            self._model.fold(*graft.key)
        except ValueError as error:
            _log.info("esper: a fossil stays beside its host: %s", error)
            return False
        return True

    def finish(self) -> None:
        """Ends every graft that has not reached its verdict: the run is over.

        What was never blended in leaves without a trace; what was, is culled, because nobody has
        shown that it helps.
        """
        for graft in list(self.live.values()):
            state = self._model.seed_state(*graft.key)
            reason = "the run ended before the trial"
            if state is State.FINE_TUNING and (graft.passed or self._config.probation_steps == 0):
                self._fossilize(graft, "the run ended after a passed trial")
            elif state in BLENDED:
                self._model.cull(*graft.key, reason=reason)
            else:
                self._model.unload_kernel(*graft.key, reason=reason)
