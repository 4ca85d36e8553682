"""The short form of `make chaos`."""

import pytest

from chaos.run import run_chaos


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_server_keeps_every_promise() -> None:
    outcome = run_chaos(num_cycles=5, seed=11)
    assert outcome.faults == []
    assert outcome.num_cycles == 5
    lacking = [what for what, number in outcome.counts.items() if not number]
    assert lacking in ([], ["times compacted"])
