"""Every mistake that a user can make with a seed: named, and without effect."""

import hashlib

import pytest
import torch
from seed_host import Net
from seed_host import to_state
from torch import nn

from esper.blueprints import get
from esper.blueprints import lower
from esper.blueprints import weights_to_bytes
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import lifecycle_pb2
from esper.kasmina import unwrap
from esper.kasmina import wrap

INPUT = blueprint_pb2.SEED_SOURCE_INPUT
OUTPUT = blueprint_pb2.SEED_SOURCE_OUTPUT


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wrap(Net())


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_mistakes_are_named_and_change_nothing(model):
    to_state(model, "body.0", 0, "TRAINING")
    before = model.bank.to_bytes()
    parameters = [name for name, _ in model.named_parameters()]
    mistakes = [
        (lambda: model.seed_state("body", 0), "slot is 'body'.*near names: body.0"),
        (lambda: model.seed_state("body.0", 4), "seed is 4, but slot 'body.0' has seeds 0 to 3"),
        (lambda: model.seed_state("body.0", -1), "seed is -1"),
        (lambda: model.germinate("nope", 0, "lora"), "slot is 'nope'"),
        (lambda: model.germinate("keys", 9, "lora"), "seed is 9"),
        (lambda: model.germinate("keys", 0, "loar"), "loar"),
        (lambda: model.germinate("keys", 0, "lora", depth=3), "depth"),
        (lambda: model.germinate("keys", 0, get("lora"), rank=3), "hyperparameters are .'rank'."),
        (
            lambda: model.germinate("body.0", 0, "lora"),
            "seed 0 is TRAINING, but a kernel can be loaded into a DORMANT seed only",
        ),
        (
            lambda: model.advance("body.0", 0, "FOSSILIZED"),
            "slot 'body.0', seed 0: a seed cannot go from TRAINING to FOSSILIZED",
        ),
        (lambda: model.advance("body.0", 1, "TRAINING"), "from DORMANT to TRAINING"),
        (lambda: model.advance("body.0", 1, "GERMINATED"), "by load_kernel or germinate only"),
        (lambda: model.advance("body.0", 0, "BLOOMING"), "state is 'BLOOMING'"),
        (lambda: model.cull("body.0", 1), "from DORMANT to CULLED"),
        (lambda: model.set_seed_alpha("body.0", 0, 0.5), "alpha can be set in GRAFTING only"),
        (
            lambda: model.set_schedule("body.0", 0, lifecycle_pb2.AlphaSchedule(steps=0)),
            "steps is 0",
        ),
        (
            lambda: model.set_schedule("body.0", 0, lifecycle_pb2.AlphaSchedule(steps=2, end=1.5)),
            "end is 1.5",
        ),
        (
            lambda: model.set_schedule("body.0", 0, lifecycle_pb2.AlphaSchedule(kind=99, steps=2)),
            "schedule.kind is 99",
        ),
        (lambda: model.signature("body.0", 0, 0), "source is 0"),
        (lambda: setattr(model, "telemetry_interval", 0), "telemetry_interval is 0"),
        (lambda: wrap(model), "wrapped already"),
        (lambda: wrap(model.host), "wrapped already"),
        (lambda: wrap(nn.Sequential(model.host.body)), "wrapped already"),
        (lambda: unwrap(model.host), "model is a Net"),
    ]
    for mistake, message in mistakes:
        with pytest.raises(ValueError, match=message):
            mistake()
        assert model.bank.to_bytes() == before
        assert [name for name, _ in model.named_parameters()] == parameters


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf")])
def test_alpha_stays_within_its_bounds(model, alpha):
    to_state(model, "body.0", 0, "GRAFTING")
    with pytest.raises(ValueError, match="alpha is"):
        model.set_seed_alpha("body.0", 0, alpha)


def kernel_for(model, slot="body.0", seed=0, blueprint="bottleneck", source=OUTPUT, **changes):
    signature = model.signature(slot, seed, source)
    for field, value in changes.items():
        setattr(signature, field, value)
    return lower(get(blueprint), signature)


@pytest.mark.parametrize(
    ("changes", "field", "value", "rule"),
    [
        (
            {"chunk_width": 3, "source_width": 3},
            "signature.chunk_width",
            "3",
            "must be the seed's 2",
        ),
        (
            {"dtype": kernel_pb2.DATA_TYPE_BFLOAT16},
            "signature.dtype",
            "DATA_TYPE_BFLOAT16",
            "must be the seed's DATA_TYPE_FLOAT32",
        ),
        (
            {"device_class": kernel_pb2.DEVICE_CLASS_CUDA},
            "signature.device_class",
            "DEVICE_CLASS_CUDA",
            "must be the seed's DEVICE_CLASS_CPU",
        ),
        (
            {"source": INPUT, "source_width": 7, "blueprint": "widen"},
            "signature.source_width",
            "7",
            "must be the seed's 6",
        ),
        (
            {"slot_kind": kernel_pb2.SLOT_KIND_CONV, "blueprint": "depthwise"},
            "signature.slot_kind",
            "SLOT_KIND_CONV",
            "must lay features out as the slot's SLOT_KIND_LINEAR",
        ),
    ],
)
def test_a_kernel_for_another_place_is_refused(model, changes, field, value, rule):
    kernel = kernel_for(model, **changes)
    with pytest.raises(ValueError) as caught:
        model.load_kernel("body.0", 0, kernel)
    assert (caught.value.field, caught.value.value, caught.value.rule) == (field, value, rule)
    assert model.occupied_seeds() == [] and model.kernel_cache.stats().num_kernels == 0


def test_a_kernel_without_sense_is_refused(model):
    kernel = kernel_for(model)
    kernel.parameters[0].shape[0] += 1
    with pytest.raises(ValueError, match="kernel.parameters"):
        model.load_kernel("body.0", 0, kernel)
    assert model.occupied_seeds() == []


def spoil(weights, how):
    if how == "missing":
        del weights["B"]
    elif how == "unknown":
        weights["C"] = torch.zeros(2)
    elif how == "shape":
        weights["B"] = weights["B"].T
    elif how == "type":
        weights["B"] = weights["B"].double()
    elif how == "nan":
        weights["B"] = weights["B"].clone().fill_(float("nan"))
    return weights


@pytest.mark.parametrize("how", ["missing", "unknown", "shape", "type", "nan"])
def test_weights_that_do_not_fit_are_refused(model, how):
    kernel = kernel_for(model)
    weights = {spec.name: torch.zeros(tuple(spec.shape)) for spec in kernel.parameters}
    with pytest.raises(ValueError, match="weights"):
        model.load_kernel("body.0", 0, kernel, spoil(dict(weights), how))
    assert model.occupied_seeds() == []
    model.load_kernel("body.0", 0, kernel, weights)


def with_blob(kernel, weights):
    blob = weights_to_bytes(weights)
    kernel.weights.hash = hashlib.sha256(blob).hexdigest()
    kernel.weights.size_bytes = len(blob)
    return kernel


def test_a_kernel_with_weights_needs_them_once(model):
    kernel = kernel_for(model)
    weights = {
        spec.name: torch.randn(tuple(spec.shape), generator=torch.Generator().manual_seed(1))
        for spec in kernel.parameters
    }
    with_blob(kernel, weights)
    with pytest.raises(ValueError, match=f"weights is 'absent'.*{kernel.weights.hash}"):
        model.load_kernel("body.0", 0, kernel)
    model.load_kernel("body.0", 0, kernel, weights)
    model.load_kernel("body.0", 1, kernel)  # from the cache
    for seed in (0, 1):
        for spec, parameter in zip(
            kernel.parameters, model.seed_parameters("body.0", seed), strict=True
        ):
            assert torch.equal(parameter, weights[spec.name])
            assert parameter.data_ptr() != weights[spec.name].data_ptr()


def test_weights_of_one_graft_are_not_those_of_its_kernel(model):
    kernel = kernel_for(model)
    trained = {spec.name: torch.ones(tuple(spec.shape)) for spec in kernel.parameters}
    born = {spec.name: torch.zeros(tuple(spec.shape)) for spec in kernel.parameters}
    with_blob(kernel, born)
    model.load_kernel("body.0", 0, kernel, trained)
    assert bool((model.seed_parameters("body.0", 0)[0] == 1).all())
    with pytest.raises(ValueError, match="weights is 'absent'"):
        model.load_kernel("body.0", 1, kernel)
