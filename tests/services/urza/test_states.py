import itertools

import pytest

from esper.services.serving.errors import ServiceError
from esper.services.urza.states import BLUEPRINT_MOVES
from esper.services.urza.states import KERNEL_MOVES
from esper.services.urza.states import require_blueprint_move
from esper.services.urza.states import require_kernel_move
from esper.urza.v1 import library_pb2 as pb

# As proto/esper/urza/v1/library.proto says in words.
BLUEPRINT_LINE = ["PROPOSED", "COMPILING", "VALIDATING", "CHARACTERIZED", "DEPLOYED"]
LEGAL_BLUEPRINT_MOVES = {
    *itertools.pairwise(BLUEPRINT_LINE),
    *itertools.product(BLUEPRINT_LINE, ["FAILED", "ARCHIVED"]),
    ("FAILED", "COMPILING"),
    ("FAILED", "ARCHIVED"),
}
LEGAL_KERNEL_MOVES = {
    *itertools.pairwise(["TESTING", "VALIDATED", "DEPLOYED", "DEPRECATED"]),
    ("TESTING", "INVALID"),
    ("VALIDATED", "INVALID"),
    ("VALIDATED", "DEPRECATED"),
}


def legal(check: object, enum: object, prefix: str) -> set[tuple[str, str]]:
    values = {name.removeprefix(prefix): value for name, value in enum.items() if value}
    found = set()
    for before, after in itertools.product(values, values):
        try:
            check("x/1", values[before], values[after])
            found.add((before, after))
        except ServiceError as error:
            assert error.reason == "ILLEGAL_MOVE"
            assert error.metadata == {"before": prefix + before, "after": prefix + after}
    return found


def test_blueprints_move_as_declared_and_not_otherwise() -> None:
    moves = legal(require_blueprint_move, pb.BlueprintState, "BLUEPRINT_STATE_")
    assert moves == LEGAL_BLUEPRINT_MOVES


def test_kernels_move_as_declared_and_not_otherwise() -> None:
    assert legal(require_kernel_move, pb.KernelState, "KERNEL_STATE_") == LEGAL_KERNEL_MOVES


@pytest.mark.parametrize(
    ("moves", "enum"), [(BLUEPRINT_MOVES, pb.BlueprintState), (KERNEL_MOVES, pb.KernelState)]
)
def test_every_state_has_its_moves(moves: dict[int, frozenset[int]], enum: object) -> None:
    assert set(moves) == {value for value in enum.values() if value}
