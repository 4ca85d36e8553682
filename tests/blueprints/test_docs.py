"""docs/blueprints.md says what the op table, the limits and the library say."""

from pathlib import Path

from esper.blueprints import attributes
from esper.blueprints import checker
from esper.blueprints.attributes import AttributeSpec
from esper.blueprints.attributes import Value
from esper.blueprints.library import get
from esper.blueprints.library import names
from esper.blueprints.lowering import PIPELINES
from esper.blueprints.ops import OPS
from esper.blueprints.sizes import SYMBOLS

DOCS = (Path(__file__).parents[2] / "docs" / "blueprints.md").read_text()


def shown(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def described(attribute: AttributeSpec) -> str:
    """Returns an attribute as the table shows it: name, type, bounds, default."""
    text = f"`{attribute.name}` {attribute.kind.name.lower()}"
    if attribute.choices:
        text += " (" + ", ".join(attribute.choices) + ")"
    if attribute.low is not None and attribute.high is not None:
        text += f" {attribute.low:g} to {attribute.high:g}"
    if attribute.required:
        return text + ", required"
    return text + (", optional" if attribute.default is None else f" = {shown(attribute.default)}")


def row(op: int) -> str:
    """Returns the table's row of an op."""
    spec = OPS[op]
    inputs = f"{spec.min_inputs}"
    if spec.max_inputs != spec.min_inputs:
        inputs += f" to {spec.max_inputs}"
    listed = "; ".join(described(attribute) for attribute in spec.attributes) or "none"
    parameters = (
        (spec.parameters.__doc__ or "").rstrip(".").replace("An op without parameters", "none")
    )
    return f"| `{spec.name}` | {inputs} | {spec.summary} | {listed} | {parameters} |"


def test_the_op_table_is_the_code() -> None:
    missing = [row(op) for op in sorted(OPS) if row(op) not in DOCS]
    assert not missing, "docs/blueprints.md lacks:\n" + "\n".join(missing)
    assert DOCS.count("\n| `") >= len(OPS)


def test_limits() -> None:
    for number in (
        checker.MAX_NODES,
        checker.MAX_HYPERPARAMETERS,
        checker.MAX_TAGS,
        checker.MAX_RANK,
        attributes.MAX_AXES,
        attributes.MAX_ELEMENTS,
    ):
        assert f"| {number} |" in DOCS, number


def test_symbols_pipelines_and_library_are_all_named() -> None:
    for symbol in SYMBOLS:
        assert f"`{symbol}`" in DOCS
    for way in PIPELINES:
        assert f"| `{way.name}` | {way.description} |" in DOCS
    for name in names():
        blueprint = get(name)
        chosen = ", ".join(f"`{entry.name}`" for entry in blueprint.hyperparameters) or "none"
        assert f"| `{name}` | {blueprint.description} | {chosen} |" in DOCS
