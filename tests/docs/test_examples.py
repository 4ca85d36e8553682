"""The example loops of the documentation run as they stand, and grow."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "grows"), [("mlp", True), ("cnn", True), ("transformer_lm", False)]
)
def test_an_example_learns_and_plants_a_seed_where_five_epochs_are_enough(
    name: str, grows: bool
) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    history = example.main(epochs=5)
    assert history.plane_failure is None
    assert history.epochs[-1].held_out_loss < history.epochs[0].held_out_loss
    if grows:
        assert "GRAFTING" in [event.after for event in history.events]
    assert len(history.epochs) == 5


def test_every_example_is_run() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == ["cnn", "mlp", "transformer_lm"]
