"""The canonical form itself, and what of a kernel counts."""

import json

import pytest
from google.protobuf.message import Message

from esper.blueprints import digest
from esper.blueprints.builder import GraphBuilder
from esper.blueprints.digest import blueprint_digest
from esper.blueprints.digest import kernel_digest
from esper.blueprints.library import get
from esper.blueprints.lowering import lower
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2

SIGNATURE = kernel_pb2.KernelSignature(
    slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
    chunk_width=8,
    source_width=8,
    source=blueprint_pb2.SEED_SOURCE_OUTPUT,
    dtype=kernel_pb2.DATA_TYPE_FLOAT32,
    device_class=kernel_pb2.DEVICE_CLASS_CPU,
)


def test_canonical_form_is_the_documented_one() -> None:
    # Stored digests depend on this text: a change here orphans every library.
    text = digest.canonical_blueprint(get("affine"))
    assert text == (
        '{"hyperparameters":{},'
        '"inputs":[{"shape":{"dims":[{"symbol":"N"},{"symbol":"D"}]},"source":1}],'
        '"nodes":[{"attributes":{"axis":{"int_value":-1},"bias":{"bool_value":true},'
        '"init":{"string_value":"zeros"}},"inputs":[[0,0]],"op":"scale"}],'
        '"outputs":[[1,0]]}'
    )
    assert blueprint_digest(get("affine")) == (
        "b1fb9629e96a5a9dd4097d0eeb372bc50b74077cb3995573a991a902c85e7189"
    )


def test_numbers_are_exact_and_typed() -> None:
    graph = GraphBuilder()
    blueprint = blueprint_pb2.Blueprint(
        name="third", graph=graph.returns(graph.node("scale", graph.input, factor=1 / 3))
    )
    node = json.loads(digest.canonical_blueprint(blueprint))["nodes"][0]
    assert node["attributes"]["factor"] == {"float_value": "0.3333333333333333"}
    nearest = GraphBuilder()
    value = nearest.node("scale", nearest.input, factor=0.33333333333333337)
    other = blueprint_pb2.Blueprint(name="third", graph=nearest.returns(value))
    assert blueprint_digest(other) != blueprint_digest(blueprint)


def _leaves(message: Message, path: str = "") -> list[tuple[Message, str]]:
    """Returns every scalar field of a message and what it holds, as (owner, name)."""
    found: list[tuple[Message, str]] = []
    for field, value in message.ListFields():
        items = value if field.is_repeated else [value]
        if field.message_type is None:
            found += [] if field.is_repeated else [(message, field.name)]
        elif not field.message_type.GetOptions().map_entry:
            for item in items:
                found += _leaves(item)
    return found


@pytest.mark.parametrize("name", ["bottleneck", "norm_mlp"])
def test_every_field_of_a_kernel_counts_but_the_name(name: str) -> None:
    kernel = lower(get(name), SIGNATURE)
    kernel.weights.hash, kernel.weights.size_bytes = "0" * 64, 5
    before = kernel_digest(kernel)
    leaves = _leaves(kernel)
    assert len(leaves) > 20
    for owner, field in leaves:
        value = getattr(owner, field)
        setattr(owner, field, value + "x" if isinstance(value, str) else (not value) * 1)
        same = kernel_digest(kernel) == before
        assert same == (field == "blueprint_name"), field
        setattr(owner, field, value)
    assert kernel_digest(kernel) == before


def test_parameter_order_and_absent_weights_count() -> None:
    kernel = lower(get("lora"), SIGNATURE)
    before = kernel_digest(kernel)
    kernel.weights.SetInParent()
    assert kernel_digest(kernel) != before
    kernel.ClearField("weights")
    first, second = kernel.parameters
    del kernel.parameters[:]
    kernel.parameters.extend([second, first])
    assert kernel_digest(kernel) != before
