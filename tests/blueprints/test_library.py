"""The starting blueprints."""

import pytest
import torch

from esper.blueprints.checker import check
from esper.blueprints.errors import BlueprintError
from esper.blueprints.init import init_parameters
from esper.blueprints.interpreter import reference_module
from esper.blueprints.library import get
from esper.blueprints.library import names
from esper.blueprints.lowering import lower
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2

PLANES = ("squeeze_excite", "depthwise")  # blueprints over channels on axis 1


def kernel_of(name: str) -> kernel_pb2.Kernel:
    blueprint = get(name)
    source = blueprint.graph.inputs[0].source
    conv = name in PLANES
    return lower(
        blueprint,
        kernel_pb2.KernelSignature(
            slot_kind=kernel_pb2.SLOT_KIND_CONV if conv else kernel_pb2.SLOT_KIND_LINEAR,
            chunk_width=8,
            source_width=8 if source == blueprint_pb2.SEED_SOURCE_OUTPUT else 5,
            source=source,
            dtype=kernel_pb2.DATA_TYPE_FLOAT32,
            device_class=kernel_pb2.DEVICE_CLASS_CPU,
        ),
    )


def test_names() -> None:
    assert names()[:6] == ("noop", "affine", "lora", "bottleneck", "widen", "glu")


@pytest.mark.parametrize("name", names())
def test_adds_exactly_zero_at_birth_and_learns_from_the_first_step(name: str) -> None:
    kernel = kernel_of(name)
    weights = init_parameters(kernel, torch.Generator().manual_seed(1))
    module = reference_module(kernel, weights)
    width = kernel.signature.source_width
    source = torch.randn((3, width, 4, 4) if name in PLANES else (3, width))
    g = module(source)
    assert g.shape[1] == 8
    assert torch.count_nonzero(g) == 0
    if name != "noop":
        target = torch.randn_like(g)
        (g * target).sum().backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
        # No fan-in is born at zero: a rectifier over zeros would never wake up.
        first = kernel.parameters[0]
        if len(kernel.parameters) > 2:
            assert weights[first.name].abs().min() > 0


@pytest.mark.parametrize("name", names())
def test_is_sound_and_states_what_was_chosen(name: str) -> None:
    blueprint = get(name)
    assert check(blueprint).name == name
    assert blueprint.description and blueprint.author
    assert all(entry.description for entry in blueprint.hyperparameters)
    assert list(blueprint.tags) == []


def test_choices_reach_graph_and_record() -> None:
    blueprint = get("bottleneck", rank=3, activation="relu", source="input", gain=2)
    values = {entry.name: entry.value for entry in blueprint.hyperparameters}
    assert values["rank"].int_value == 3
    assert values["activation"].string_value == "relu"
    assert values["source"].string_value == "input"
    assert values["gain"].float_value == 2.0
    graph = blueprint.graph
    assert graph.inputs[0].source == blueprint_pb2.SEED_SOURCE_INPUT
    assert graph.nodes[1].op == blueprint_pb2.OP_RELU
    assert graph.nodes[0].attributes["gain"].float_value == 2.0
    assert get("bottleneck") == get("bottleneck", rank=16, activation="gelu", source="output")


@pytest.mark.parametrize(
    ("name", "hyperparameters", "field", "value", "rule"),
    [
        ("resnet", {}, "blueprint", "resnet", "must be one of noop, affine"),
        ("noop", {"rank": 1}, "hyperparameters.rank", "1", "only none"),
        ("lora", {"depth": 1}, "hyperparameters.depth", "1", "only rank, source, gain"),
        ("lora", {"rank": 0}, "hyperparameters.rank", "0", "at least 1"),
        ("lora", {"rank": 65537}, "hyperparameters.rank", "65537", "at most 65536"),
        ("lora", {"rank": 2.0}, "hyperparameters.rank", "2.0", "a whole number"),
        ("lora", {"rank": True}, "hyperparameters.rank", "True", "a whole number"),
        ("lora", {"rank": "2"}, "hyperparameters.rank", "'2'", "a whole number"),
        ("lora", {"gain": float("nan")}, "hyperparameters.gain", "nan", "must be finite"),
        ("lora", {"source": "both"}, "hyperparameters.source", "both", "one of output, input"),
        ("glu", {"activation": "elu"}, "hyperparameters.activation", "elu", "one of identity"),
        ("glu", {"activation": 1}, "hyperparameters.activation", "1", "a word"),
        ("squeeze_excite", {"positions": 3}, "hyperparameters.positions", "3", "at most 2"),
        ("depthwise", {"kernel": 4}, "hyperparameters.kernel", "4", "must be odd"),
    ],
)
def test_errors_name_field_value_and_rule(
    name: str,
    hyperparameters: dict[str, int | float | str],
    field: str,
    value: str,
    rule: str,
) -> None:
    with pytest.raises(BlueprintError) as caught:
        get(name, **hyperparameters)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert rule in caught.value.rule
