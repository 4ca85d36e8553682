"""Digests of blueprints and kernels: the SHA-256 of a canonical JSON text."""

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Sequence

from google.protobuf.message import Message

from esper.blueprints.attributes import encode
from esper.blueprints.checker import CheckedNode
from esper.blueprints.checker import check
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2

Json = str | int | bool | Sequence["Json"] | Mapping[str, "Json"]


def blueprint_digest(blueprint: blueprint_pb2.Blueprint) -> str:
    """Returns the 64-character digest of a blueprint's canonical form.

    Raises:
        BlueprintError: Where the blueprint is not sound, as only sound ones have a canonical form.
    """
    return _sha256(canonical_blueprint(blueprint))


def kernel_digest(kernel: kernel_pb2.Kernel) -> str:
    """Returns the 64-character digest of every field of a kernel but `blueprint_name`."""
    return _sha256(canonical_kernel(kernel))


def canonical_blueprint(blueprint: blueprint_pb2.Blueprint) -> str:
    """Returns the text that stands for a blueprint.

    Nodes are numbered in depth-first post-order from the output, operands in order, so ids and the
    order of nodes do not count; defaults are filled in, so leaving one out does not count either.

    Raises:
        BlueprintError: Where the blueprint is not sound.
    """
    graph = check(blueprint).graph
    # The checked graph has R bound; the symbol itself is what counts, so attributes and shapes are
    # taken from the message wherever it states them.
    stated = {node.id: node for node in blueprint.graph.nodes}
    given = blueprint.graph.inputs[0]
    return _text(
        {
            "hyperparameters": {
                hyperparameter.name: _typed(hyperparameter.value)
                for hyperparameter in blueprint.hyperparameters
            },
            "inputs": [{"shape": _message(given.shape), "source": given.source}],
            "nodes": [
                {
                    "attributes": _attributes(stated[node.id], node),
                    "inputs": [list(operand) for operand in node.inputs],
                    "op": node.spec.name,
                }
                for node in graph.nodes
            ],
            "outputs": [list(graph.output)],
        }
    )


def canonical_kernel(kernel: kernel_pb2.Kernel) -> str:
    """Returns the text that stands for a kernel."""
    counted = kernel_pb2.Kernel()
    counted.CopyFrom(kernel)
    counted.ClearField("blueprint_name")
    return _text(_message(counted))


def _attributes(stated: blueprint_pb2.Node, node: CheckedNode) -> dict[str, Json]:
    kinds = {attribute.name: attribute.kind for attribute in node.spec.attributes}
    return {
        name: _typed(
            stated.attributes[name] if name in stated.attributes else encode(kinds[name], value)
        )
        for name, value in node.attributes.values.items()
    }


def _typed(attribute: blueprint_pb2.Attribute) -> Json:
    """Returns the set field by name, so that 1, 1.0 and true differ."""
    return _message(attribute)


def _message(message: Message) -> dict[str, Json]:
    """Returns every field of a message; unset ones that know presence are left out."""
    fields: dict[str, Json] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            fields[field.name] = {key: _value(value[key]) for key in value}
        elif field.is_repeated:
            fields[field.name] = [_value(item) for item in value]
        else:
            fields[field.name] = _value(value)
    return fields


def _value(value: object) -> Json:
    if isinstance(value, Message):
        return _message(value)
    if isinstance(value, float):
        # As text: JSON has one kind of number, and 1.0, 1 and -0.0 must stay apart.
        return repr(value)
    assert isinstance(value, bool | int | str)
    return value


def _text(value: Json) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()
