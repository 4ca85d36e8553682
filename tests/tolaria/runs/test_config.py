"""Configuration files: strict, with the line of what is wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.config import BudgetConfig
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GovernorConfig
from esper.config import GraftConfig
from esper.tolaria.runs.config import ConfigError
from esper.tolaria.runs.config import HostConfig
from esper.tolaria.runs.config import OptimizerConfig
from esper.tolaria.runs.config import RunConfig
from esper.tolaria.runs.config import dump_config
from esper.tolaria.runs.config import parse_config
from esper.tolaria.runs.config import read_config

SHIPPED = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
WHOLE = """\
task: digits
epochs: 3
host:
  target_layers: [net]
optimizer:
  learning_rate: 1e-2
  options:
    betas: [0.9, 0.99]
growth:
  candidates:
    - blueprint: widen
      ranks: [4, 8]
  graft:
    training_steps: 5
  governor:
    false_alarm_rate: 1e-7
    give_up: go_on
"""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_read(path: Path) -> None:
    assert read_config(path).task == path.stem


def test_every_kind_of_value_is_read() -> None:
    config = parse_config(WHOLE, "f")
    assert config == RunConfig(
        task="digits",
        epochs=3,
        host=HostConfig(target_layers=("net",)),
        optimizer=OptimizerConfig(learning_rate=0.01, options={"betas": (0.9, 0.99)}),
        growth=EsperConfig(
            candidates=(Candidate(blueprint="widen", ranks=(4, 8)),),
            graft=GraftConfig(training_steps=5),
            governor=GovernorConfig(false_alarm_rate=1e-7, give_up="go_on"),
        ),
    )
    assert type(config.epochs) is int and type(config.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    ("line", "wrong", "message"),
    [
        ("task: digits", "tsk: digits", "f:1: tsk is unknown: did you mean task?"),
        ("task: digits", "task: digit", "f:1: task is 'digit', but it must be one of digits"),
        ("epochs: 3", "epochs: 0", "f:2: epochs is 0, but it must be at least 1"),
        ("epochs: 3", "epochs: true", "f:2: epochs: True must be of type int"),
        ("epochs: 3", "epochs: 3.5", "f:2: epochs: 3.5 must be of type int"),
        ("epochs: 3", "epochs: 3\nepochs: 4", "f:3: found duplicate key"),
        ("epochs: 3", "epochs: [3", "f:3: "),
        ("epochs: 3", "mode: sync", "f:2: mode: "),
        ("[net]", "net", "f:4: host.target_layers: 'net' must be 'auto' or a list of names"),
        ("1e-2", "'0.01'", "f:6: optimizer.learning_rate: '0.01' must be of type float"),
        ("1e-2", "-1", "f:6: optimizer: learning_rate is -1.0, but it must be above 0"),
        ("  learning_rate", "  name: Adm\n  learning_rate", "f:6: optimizer: name is 'Adm'"),
        ("  learning_rate", "  scheduler: Stp\n  learning_rate", "f:6: optimizer: scheduler is"),
        ("betas: [", "betas: [a, ", "f:8: optimizer.options.betas"),
        ("blueprint: widen", "blueprints: widen", "f:11: growth.candidates.0.blueprints is unkn"),
        ("[4, 8]", "[4, 0]", "f:12: growth.candidates.0: ranks is 0"),
        ("[4, 8]", "[4, x]", "f:12: growth.candidates.0.ranks"),
        ("training_steps: 5", "trainig_steps: 5", "f:14: growth.graft.trainig_steps is unknown"),
        ("training_steps: 5", "training_steps: -5", "f:14: growth.graft: training_steps is -5"),
        (WHOLE, "", "f:1: a configuration is a mapping"),
        (WHOLE, "epochs: 3", "f:1: task is missing"),
    ],
)
def test_errors_have_line_key_and_rule(line: str, wrong: str, message: str) -> None:
    assert line in WHOLE
    with pytest.raises(ConfigError) as caught:
        parse_config(WHOLE.replace(line, wrong), "f")
    assert str(caught.value).startswith(message), str(caught.value)


def test_nothing_is_made_from_tags() -> None:
    with pytest.raises(ConfigError):
        parse_config("task: !!python/object/apply:os.getcwd []", "f")


@settings(deadline=None)
@given(
    st.integers(1, 99),
    st.none() | st.integers(1, 99),
    st.floats(1e-9, 10),
    st.dictionaries(st.sampled_from(["eps", "lr_decay"]), st.floats(0, 1) | st.booleans()),
    st.none() | st.integers(1, 10**9),
)
def test_what_is_written_is_read_back(
    epochs: int,
    size: int | None,
    rate: float,
    options: dict[str, float | bool],
    parameters: int | None,
) -> None:
    config = RunConfig(
        task="digits",
        epochs=epochs,
        host=HostConfig(size=size),
        optimizer=OptimizerConfig(learning_rate=rate, options=options),
        growth=EsperConfig(budget=BudgetConfig(max_parameters=parameters)),
    )
    assert parse_config(dump_config(config), "f") == config
    assert parse_config(dump_config(replace(config, grow=False)), "f") != config
