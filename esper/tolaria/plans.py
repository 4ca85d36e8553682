"""Plans: how long a graft learns, blends and settles before its trial."""

import math

from esper.common.v1 import lifecycle_pb2
from esper.config import GraftConfig
from esper.tamiyo.v1 import controller_pb2


def complete_plan(
    plan: controller_pb2.GraftPlan | None, defaults: GraftConfig
) -> controller_pb2.GraftPlan:
    """Returns the decision's plan, or one made of the configured defaults where there is none."""
    if plan is not None:
        complete = controller_pb2.GraftPlan()
        complete.CopyFrom(plan)
    else:
        complete = controller_pb2.GraftPlan(
            training_steps=defaults.training_steps,
            alpha=_ramp(defaults),
            stabilization_steps=defaults.stabilization_steps,
        )
    if not complete.HasField("alpha"):
        complete.alpha.steps = 1
    if complete.learning_rate_scale == 0:
        complete.learning_rate_scale = defaults.learning_rate_scale
    return complete


def _ramp(defaults: GraftConfig) -> lifecycle_pb2.AlphaSchedule:
    if defaults.ramp == "none":
        return lifecycle_pb2.AlphaSchedule(steps=defaults.ramp_steps, start=1.0, end=1.0)
    kind = f"ALPHA_SCHEDULE_KIND_{defaults.ramp.upper()}"
    return lifecycle_pb2.AlphaSchedule(
        kind=kind, steps=defaults.ramp_steps, drift_tolerance=defaults.drift_tolerance
    )


def rest_of_ramp(plan: controller_pb2.GraftPlan, alpha: float) -> lifecycle_pb2.AlphaSchedule:
    """Returns a plan's ramp for a seed that is in the middle of it: as steep, and from its alpha.

    Args:
        plan: The plan.
        alpha: The alpha that the seed has now.
    """
    ramp = lifecycle_pb2.AlphaSchedule()
    ramp.CopyFrom(plan.alpha)
    end = ramp.end if ramp.HasField("end") else 1.0
    if end > ramp.start:
        left = (end - alpha) / (end - ramp.start)
        ramp.steps = max(1, math.ceil(ramp.steps * min(1.0, left)))
        ramp.start = alpha
    return ramp


def plan_steps(plan: controller_pb2.GraftPlan) -> int:
    """Returns the optimizer steps from germination until the seed is due for its trial.

    A drift-controlled ramp may take more.
    """
    return plan.training_steps + plan.alpha.steps + plan.stabilization_steps + 1


def check_plan(plan: controller_pb2.GraftPlan) -> None:
    """Refuses a plan that cannot be carried out; its ramp is checked by the seed bank.

    Raises:
        ValueError: With the field, the value and the rule.
    """
    for name in ("training_steps", "stabilization_steps"):
        if getattr(plan, name) < 0:
            raise ValueError(f"plan.{name} is {getattr(plan, name)}, but it must be at least 0")
    if not 0.0 < plan.learning_rate_scale < math.inf:
        raise ValueError(
            f"plan.learning_rate_scale is {plan.learning_rate_scale}, but it must be finite and "
            "above 0"
        )
