"""Carries out what the controller asks for, within what the run allows.

The plane proposes; the training process disposes. A decision that does not fit the run, its budget
or the lifecycle is refused with a reason and changes nothing, and no decision leads around the
held-out trial.
"""

import logging

from esper.common.v1 import kernel_pb2
from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.kasmina import SeedLifecycleState
from esper.kasmina import lifecycle
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria.births import singular_weights
from esper.tolaria.cost import TrainingCost
from esper.tolaria.link import Advice
from esper.tolaria.plans import complete_plan
from esper.tolaria.plans import plan_steps
from esper.tolaria.protocol import GraftProtocol

_log = logging.getLogger("esper")

State = SeedLifecycleState

_ACTION_NAMES = {number: name for name, number in controller_pb2.Action.items()}


def action_name(decision: controller_pb2.Decision) -> str:
    """Returns the name of a decision's action, or its number where this release knows no name."""
    return _ACTION_NAMES.get(decision.action, str(decision.action))


def flops_per_sample(model: MorphableModel, slot: str, kernel: kernel_pb2.Kernel) -> float:
    """Returns the forward operations that a kernel adds to a sample in this slot."""
    return kernel.flops_per_token * (model.slots[slot].tokens_per_sample or 1.0)


class Decisions:
    """Applies decisions to one model.

    Args:
        model: The growing model.
        protocol: Takes over what is germinated.
        cost: Knows what the model costs now.
        config: The budget, and defaults for plans.
    """

    def __init__(
        self,
        model: MorphableModel,
        protocol: GraftProtocol,
        cost: TrainingCost,
        config: EsperConfig,
    ) -> None:
        self._model = model
        self._protocol = protocol
        self._cost = cost
        self._config = config

    def complete(self, advice: Advice) -> Advice:
        """Returns a decision with the weights that the run's own measurements give to a newborn.

        Args:
            advice: The decision, as the plane made it.
        """
        decision, kernel = advice.decision, advice.kernel
        if (
            kernel is None
            or advice.weights is not None
            or self._config.graft.fan_in != "singular"
            or decision.slot not in self._model.slots
        ):
            return advice
        directions = self._model.growth_directions(
            decision.slot, decision.seed, kernel.signature.source
        )
        weights = singular_weights(kernel, directions, f"{decision.slot}/{decision.seed}")
        return Advice(decision, kernel, weights)

    def try_to(self, advice: Advice, *, epoch: int, steps_left: int) -> str | None:
        """Carries out one decision where that is possible.

        Args:
            advice: The decision, with its kernel where it germinates.
            epoch: The epoch that has ended.
            steps_left: Optimizer steps until the run ends.

        Returns:
            Why it was refused; ``None`` where it was not.
        """
        decision = advice.decision
        if decision.action == controller_pb2.ACTION_WAIT:
            _log.info("esper: epoch %d: no growth: %s", epoch, decision.explanation)
            return None
        try:
            self.apply(advice, epoch=epoch, steps_left=steps_left)
        except ValueError as error:
            name = action_name(decision)
            _log.info("esper: decision %s (%s) refused: %s", decision.id, name, error)
            return f"epoch {epoch}: {name} {decision.slot}: {error}"
        return None

    def apply(self, advice: Advice, *, epoch: int, steps_left: int) -> None:
        """Carries out one decision.

        Args:
            advice: The decision, complete, with its kernel where it germinates.
            epoch: The epoch that has ended.
            steps_left: Optimizer steps until the run ends.

        Raises:
            ValueError: If the decision is refused; nothing has changed then.
        """
        decision = advice.decision
        slot, seed, why = decision.slot, decision.seed, decision.explanation
        if decision.HasField("deadline_epoch") and epoch > decision.deadline_epoch:
            raise ValueError(
                f"deadline_epoch is {decision.deadline_epoch}, but epoch {epoch} has ended"
            )
        match decision.action:
            case controller_pb2.ACTION_GERMINATE:
                self._germinate(advice, steps_left)
            case controller_pb2.ACTION_ADVANCE:
                target = lifecycle.from_proto(decision.target_state)
                if target in (State.FINE_TUNING, State.FOSSILIZED):
                    raise ValueError(
                        f"target_state is {target.name}, but only a passed trial leads there"
                    )
                self._model.advance(slot, seed, target, reason=why)
            case controller_pb2.ACTION_SET_ALPHA:
                self._model.set_seed_alpha(slot, seed, decision.alpha)
            case controller_pb2.ACTION_CULL:
                self._model.cull(slot, seed, reason=why)
            case controller_pb2.ACTION_CANCEL:
                self._model.unload_kernel(slot, seed, reason=why)
            case _:  # FOSSILIZE is among them: only a passed trial fossilises
                raise ValueError("the session does not carry out this action")

    def _germinate(self, advice: Advice, steps_left: int) -> None:
        decision, kernel = advice.decision, advice.kernel
        assert kernel is not None, "a GERMINATE advice carries its kernel"
        plan = complete_plan(
            decision.plan if decision.HasField("plan") else None, self._config.graft
        )
        if plan_steps(plan) > steps_left:
            raise ValueError(
                f"plan takes {plan_steps(plan)} steps, but the run has only {steps_left} left"
            )
        self._model.seed_state(decision.slot, decision.seed)  # refuses a slot that is not there
        self._check_budget(decision.slot, kernel)
        self._protocol.germinate(
            decision.slot,
            decision.seed,
            decision.kernel,
            kernel,
            advice.weights,
            plan,
            decision.explanation,
        )

    def _check_budget(self, slot: str, kernel: kernel_pb2.Kernel) -> None:
        budget = self._config.budget
        if budget.max_flops_per_sample is not None:
            left = budget.max_flops_per_sample - self._cost.forward_flops_per_sample()
            added = flops_per_sample(self._model, slot, kernel)
            if added > left:
                raise ValueError(
                    f"the kernel costs {added:.0f} operations per sample, but the budget leaves "
                    f"{left}"
                )
        if budget.max_parameters is not None:
            left = budget.max_parameters - self._model.num_parameters()
            if kernel.parameter_count > left:
                raise ValueError(
                    f"parameter_count is {kernel.parameter_count}, but the budget leaves {left}"
                )
