"""How a session stands to its plane."""

from typing import Literal
from typing import get_args

Mode = Literal["async", "lockstep", "replay"]
"""See ``esper.tolaria.Session``."""


def check_run(epochs: int, mode: Mode, *, replays: bool) -> None:
    """Refuses a run that makes no sense.

    Args:
        epochs: Its planned length.
        mode: Its mode.
        replays: Whether a recorded run was given.

    Raises:
        ValueError: If it has no epoch, no known mode, or replays what is not there.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, but a run has at least 1 epoch")
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}, but it must be one of {', '.join(get_args(Mode))}")
    if (mode == "replay") != replays:
        raise ValueError(f"mode is {mode!r}, but 'replay' and a run to replay go together")
