"""Legal moves of blueprints and kernels."""

from collections.abc import Mapping

from esper.services.serving.errors import precondition
from esper.urza.v1 import library_pb2 as pb

BLUEPRINT_MOVES: Mapping[int, frozenset[int]] = {
    pb.BLUEPRINT_STATE_PROPOSED: frozenset(
        {pb.BLUEPRINT_STATE_COMPILING, pb.BLUEPRINT_STATE_FAILED, pb.BLUEPRINT_STATE_ARCHIVED}
    ),
    pb.BLUEPRINT_STATE_COMPILING: frozenset(
        {pb.BLUEPRINT_STATE_VALIDATING, pb.BLUEPRINT_STATE_FAILED, pb.BLUEPRINT_STATE_ARCHIVED}
    ),
    pb.BLUEPRINT_STATE_VALIDATING: frozenset(
        {pb.BLUEPRINT_STATE_CHARACTERIZED, pb.BLUEPRINT_STATE_FAILED, pb.BLUEPRINT_STATE_ARCHIVED}
    ),
    pb.BLUEPRINT_STATE_CHARACTERIZED: frozenset(
        {pb.BLUEPRINT_STATE_DEPLOYED, pb.BLUEPRINT_STATE_FAILED, pb.BLUEPRINT_STATE_ARCHIVED}
    ),
    pb.BLUEPRINT_STATE_DEPLOYED: frozenset(
        {pb.BLUEPRINT_STATE_FAILED, pb.BLUEPRINT_STATE_ARCHIVED}
    ),
    pb.BLUEPRINT_STATE_FAILED: frozenset(
        {pb.BLUEPRINT_STATE_COMPILING, pb.BLUEPRINT_STATE_ARCHIVED}
    ),
    pb.BLUEPRINT_STATE_ARCHIVED: frozenset(),
}

KERNEL_MOVES: Mapping[int, frozenset[int]] = {
    pb.KERNEL_STATE_TESTING: frozenset({pb.KERNEL_STATE_VALIDATED, pb.KERNEL_STATE_INVALID}),
    pb.KERNEL_STATE_VALIDATED: frozenset(
        {pb.KERNEL_STATE_DEPLOYED, pb.KERNEL_STATE_DEPRECATED, pb.KERNEL_STATE_INVALID}
    ),
    pb.KERNEL_STATE_DEPLOYED: frozenset({pb.KERNEL_STATE_DEPRECATED}),
    pb.KERNEL_STATE_DEPRECATED: frozenset(),
    pb.KERNEL_STATE_INVALID: frozenset(),
}


def require_blueprint_move(name: str, before: pb.BlueprintState, after: pb.BlueprintState) -> None:
    """Raises FAILED_PRECONDITION unless a blueprint may move from `before` to `after`."""
    if after not in BLUEPRINT_MOVES[before]:
        _refuse(name, pb.BlueprintState.Name(before), pb.BlueprintState.Name(after))


def require_kernel_move(name: str, before: pb.KernelState, after: pb.KernelState) -> None:
    """Raises FAILED_PRECONDITION unless a kernel may move from `before` to `after`."""
    if after not in KERNEL_MOVES[before]:
        _refuse(name, pb.KernelState.Name(before), pb.KernelState.Name(after))


def _refuse(name: str, before: str, after: str) -> None:
    # Keyword `from` is reserved, so the metadata says before and after.
    raise precondition(
        "ILLEGAL_MOVE", f"{name} cannot move from {before} to {after}", before=before, after=after
    )
