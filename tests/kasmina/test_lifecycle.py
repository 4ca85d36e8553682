import re

import pytest

from esper import _C
from esper.common.v1 import lifecycle_pb2
from esper.kasmina import SeedLifecycleState
from esper.kasmina import lifecycle


def test_python_states_are_the_native_ones():
    assert [(int(state), state.name) for state in SeedLifecycleState] == list(_C.LIFECYCLE)


def test_proto_states_are_the_native_ones_plus_one():
    wire = dict(lifecycle_pb2.SeedState.items())
    assert wire.pop("SEED_STATE_UNSPECIFIED") == 0
    assert wire == {f"SEED_STATE_{name}": number + 1 for number, name in _C.LIFECYCLE}


def test_documented_table_has_the_native_states():
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", lifecycle.__doc__, re.MULTILINE)
    assert [(int(number), name) for number, name in rows] == list(_C.LIFECYCLE)


def test_documented_scalars_are_those_of_the_bank():
    """The alpha columns of the table, checked by walking a seed through its life."""
    rows = re.findall(
        r"^\| \d+ \| ([A-Z_]+) \| (\S+) \| (.+?) \| (\S+) \|", lifecycle.__doc__, re.MULTILINE
    )
    documented = {name: numbers for name, *numbers in rows}
    bank = _C.SeedBank([1])
    bank.set_schedule(0, 0, "linear", 1)
    path = ("GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING")
    for name in (*path, "FOSSILIZED"):
        bank.advance(0, 0, int(SeedLifecycleState[name]))
        if name == "GRAFTING":
            bank.tick()
        symbols = {"-": 0.0, "0": 0.0, "1": 1.0, "alpha": 1.0, "1 or 0": 1.0}
        expected = [symbols[number] for number in documented[name]]
        assert bank.scalars()[0].tolist() == expected, name


def test_conversion_goes_by_name_both_ways():
    for state in SeedLifecycleState:
        number = lifecycle.to_proto(state)
        assert lifecycle_pb2.SeedState.Name(number) == f"SEED_STATE_{state.name}"
        assert lifecycle.from_proto(number) is state


@pytest.mark.parametrize("number", [0, 12, -1])
def test_unspecified_and_unknown_numbers_are_refused(number):
    with pytest.raises(ValueError, match=f"state is {number}"):
        lifecycle.from_proto(number)


@pytest.mark.parametrize("given", ["GRAFTING", 3, SeedLifecycleState.GRAFTING])
def test_parse_takes_names_numbers_and_states(given):
    assert SeedLifecycleState.parse(given) is SeedLifecycleState.GRAFTING


@pytest.mark.parametrize("given", ["grafting", "", 11, -1, "UNSPECIFIED"])
def test_parse_names_what_it_got_and_what_it_takes(given):
    with pytest.raises(ValueError, match=f"state is {given!r}.*DORMANT.*ROLLED_BACK"):
        SeedLifecycleState.parse(given)


def test_a_state_holds_a_graft_exactly_if_it_is_germinated_or_computes():
    holding = {state.name for state in SeedLifecycleState if state.holds_graft}
    computing = {state.name for state in SeedLifecycleState if state.computes}
    assert holding - computing == {"GERMINATED"}
    assert computing == {
        "TRAINING",
        "GRAFTING",
        "STABILIZATION",
        "EVALUATING",
        "FINE_TUNING",
        "FOSSILIZED",
    }
