"""A run's memory survives its stream, and nobody else's memory is taken for it."""

import pytest

from esper.common.v1 import signal_pb2
from esper.services.tamiyo.heuristic import RunState
from esper.services.tamiyo.memory import from_bytes
from esper.services.tamiyo.memory import to_bytes


def test_all_but_the_graph_is_remembered() -> None:
    state = RunState(
        graph=signal_pb2.HostGraph(digest="d"),
        planted={("net.0", 1): 5},
        refusals={("net.0", 0): (2, 3)},
        last_germination=4,
        num_decisions=7,
    )
    memory = to_bytes(state, "policy")
    assert state.graph is not None and state.graph.digest == "d"
    state.graph = None
    assert from_bytes(memory, "policy") == state
    assert to_bytes(from_bytes(memory, "policy"), "policy") == memory


@pytest.mark.parametrize("memory", [b"no JSON", b"{}", b"[]", b'{"policy": "p", "run": {"a": 1}}'])
def test_what_is_no_memory_is_refused(memory: bytes) -> None:
    with pytest.raises(ValueError, match="what this policy gave out"):
        from_bytes(memory, "p")


def test_the_memory_of_another_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="must be that of the policy in force, new"):
        from_bytes(to_bytes(RunState(), "old"), "new")
