"""The example loops of the documentation run as they stand, and grow."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer_lm"])
def test_an_example_learns_and_grafts_a_seed_in_five_epochs(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    history = example.main(epochs=5)
    assert history.plane_failure is None
    assert history.epochs[-1].held_out_loss < history.epochs[0].held_out_loss
    assert "GRAFTING" in [event.after for event in history.events]
    assert len(history.epochs) == 5


def test_every_example_is_run() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == ["cnn", "mlp", "transformer_lm"]
