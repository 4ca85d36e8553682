"""Bad input at every public entry: an error with field, value and rule, and nothing changed."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from seed_host import Net
from seed_host import to_state
from torch import nn

import esper
from esper import _C
from esper.blueprints import get
from esper.blueprints import lower
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import lifecycle_pb2
from esper.kasmina import Bridge
from esper.kasmina import KasminaLayer
from esper.kasmina import unwrap
from esper.kasmina import wrap
from esper.kasmina.sites import find_sites

NAN, INF = math.nan, math.inf
OUTPUT = blueprint_pb2.SEED_SOURCE_OUTPUT
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
WHOLE = "must be a whole number"


@dataclass
class Picture:
    """All of a model that can be seen from outside."""

    tensors: dict
    bank: bytes
    hooks: list
    parameters: list
    states: list
    cache: object
    outputs: list
    random: torch.Tensor


def picture(module):
    wrapped = isinstance(module, esper.MorphableModel)
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    random = torch.random.get_rng_state()
    outputs = []
    for training in (False, True):  # a training forward would be sampled, if it had gradients
        was = module.training
        module.train(training)
        with torch.no_grad():
            outputs.append(module(X))
        module.train(was)
    return Picture(
        {n: t.clone() for n, t in module.state_dict().items()}
        | {f"{n}.grad": g.clone() for n, g in grads.items()},
        module.bank.to_bytes() if wrapped else b"",
        [(n, list(m._forward_hooks.values())) for n, m in module.named_modules()],
        [(n, id(p), p.requires_grad, p.dtype, p.device) for n, p in module.named_parameters()],
        [module.slots[name].slot_state() for name in module.slots] if wrapped else [],
        module.kernel_cache.stats().num_bytes if wrapped else None,
        outputs,
        random,
    )


def assert_unchanged(module, before):
    after = picture(module)
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert torch.equal(tensor, after.tensors[name]), name
    for field in ("bank", "hooks", "parameters", "states", "cache"):
        assert getattr(before, field) == getattr(after, field), field
    assert all(map(torch.equal, before.outputs, after.outputs))
    assert torch.equal(before.random, after.random)


def grown():
    """Seeds on a ramp, fossilized, in training and germinated, and what a backward leaves."""
    torch.manual_seed(0)
    model = wrap(Net())
    to_state(model, "body.0", 0, "GRAFTING")
    model.set_seed_alpha("body.0", 0, 0.5)
    to_state(model, "body.0", 1, "GERMINATED")
    to_state(model, "keys", 0, "FOSSILIZED", "lora", rank=2)
    to_state(model, "keys", 1, "TRAINING")
    model(X).square().mean().backward()
    return model


def schedule(**fields):
    return lifecycle_pb2.AlphaSchedule(**({"steps": 2} | fields))


def kernel_of(model, **changes):
    signature = model.signature("body.0", 2, OUTPUT)
    for name, value in changes.items():
        setattr(signature, name, value)
    return lower(get("lora", rank=2), signature)


def weights_of(model, **changes):
    kernel = kernel_of(model)
    weights = {spec.name: torch.zeros(tuple(spec.shape)) for spec in kernel.parameters}
    return kernel, weights | changes


def whole(call, values, field, rule):
    """Bad values of one field: what each is shown as must be in the error, and the rule."""
    return [(lambda m, v=v: call(m, v), field, repr(v), rule) for v in values]


# (what is done, field, value, rule)
WITH_A_MODEL = [
    # ---- seeds and slots that are not there
    *whole(
        lambda m, v: m.seed_state("body.0", v), [4, -1, 1.0, "0", None, True, 2**70], "seed", ""
    ),
    *whole(
        lambda m, v: m.seed_state(v, 0), ["body", 3, None, ["keys"], b"keys"], "slot", "no such"
    ),
    *[
        (lambda m, f=f: f(m, "nope"), "slot", "'nope'", "the model has no such slot")
        for f in (
            lambda m, s: m.germinate(s, 0, "lora"),
            lambda m, s: m.load_kernel(s, 0, kernel_of(m)),
            lambda m, s: m.unload_kernel(s, 0),
            lambda m, s: m.cull(s, 0),
            lambda m, s: m.advance(s, 0, "GRAFTING"),
            lambda m, s: m.set_seed_alpha(s, 0, 0.5),
            lambda m, s: m.set_schedule(s, 0, schedule()),
            lambda m, s: m.fold(s, 0),
            lambda m, s: m.freeze_fossil(s, 0, True),
            lambda m, s: m.set_embargo(s, 0, 1),
            lambda m, s: m.muted(s, 0).__enter__(),
            lambda m, s: m.alpha(s, 0),
            lambda m, s: m.signature(s, 0, OUTPUT),
            lambda m, s: m.seed_parameters(s, 0),
            lambda m, s: m.kernel_of(s, 0),
            lambda m, s: m.host_parameters(s),
            lambda m, s: m.get_layer_stats(s),
            lambda m, s: m.growth_directions(s, 0, OUTPUT),
        )
    ],
    # ---- alpha and its ramp
    *whole(
        lambda m, v: m.set_seed_alpha("body.0", 0, v),
        [NAN, INF, -INF, -0.1, 1.1, 1 + 1e-9, "0.5", None, 10**400, np.float32(2)],
        "alpha",
        "must be a number in [0, 1]",
    ),
    (lambda m: m.set_seed_alpha("keys", 1, 0.5), "seed 1", "TRAINING", "set in GRAFTING only"),
    *[
        (lambda m, v=v: m.set_schedule("body.0", 0, schedule(start=v)), "start", text, "[0, 1]")
        for v, text in ((NAN, "nan"), (INF, "inf"), (-0.1, "-0.1"), (1.5, "1.5"))
    ],
    *[
        (lambda m, v=v: m.set_schedule("body.0", 0, schedule(end=v)), "end", text, "[0, 1]")
        for v, text in ((NAN, "nan"), (-INF, "-inf"), (-0.1, "-0.1"), (1.5, "1.5"))
    ],
    *[
        (lambda m, v=v: m.set_schedule("body.0", 0, schedule(steps=v)), "steps", str(v), "2**52]")
        for v in (0, -1, 2**60)
    ],
    (lambda m: m.set_schedule("body.0", 0, schedule(kind=9)), "schedule.kind", "9", "known kind"),
    (lambda m: m.set_schedule("body.0", 0, None), "schedule", "NoneType", "AlphaSchedule"),
    (
        lambda m: m.set_schedule("body.0", 0, schedule(drift_tolerance=0)),
        "tolerance",
        "0",
        "above 0",
    ),
    # ---- moves
    *whole(
        lambda m, v: m.advance("body.0", 0, v),
        ["BLOOMING", 99, -1, 3.0, None, [1], True],
        "state",
        "must be one of DORMANT, ",
    ),
    (lambda m: m.advance("body.0", 0, "GERMINATED"), "state", "GERMINATED", "load_kernel"),
    (lambda m: m.advance("body.0", 0, "FOSSILIZED"), "seed 0", "GRAFTING", "cannot go"),
    (lambda m: m.cull("body.0", 2), "seed 2", "DORMANT", "cannot go"),
    (lambda m: m.unload_kernel("body.0", 0), "seed 0", "GRAFTING", "GERMINATED or TRAINING"),
    (lambda m: m.fold("body.0", 0), "seed 0", "GRAFTING", "only a FOSSILIZED seed"),
    *whole(
        lambda m, v: m.set_embargo("body.0", 0, v), [-1, 2.5, "1", None, 2**60], "embargo", WHOLE
    ),
    (lambda m: m.set_embargo("body.0", 0, 3), "seed", "GRAFTING", "only an emptied one"),
    (lambda m: m.freeze_fossil("keys", 0, "no"), "frozen", "str", "must be of type bool"),
    # ---- rank, width, type and device of what is planted
    *whole(
        lambda m, v: m.germinate("body.0", 2, "bottleneck", rank=v),
        [0, -1, 65537, 2**40, "8", 2.5, True, None, NAN],
        "hyperparameters.rank",
        "must be a",
    ),
    (lambda m: m.germinate("body.0", 2, "loar"), "blueprint", "loar", "must be one of"),
    (
        lambda m: m.germinate("body.0", 2, None),
        "blueprint",
        "NoneType",
        "must be of type Blueprint",
    ),
    (lambda m: m.germinate("body.0", 0, "lora"), "seed 0", "GRAFTING", "a DORMANT seed only"),
    (lambda m: m.load_kernel("body.0", 2, None), "kernel", "NoneType", "must be of type Kernel"),
    (lambda m: m.load_kernel("body.0", 2, kernel_pb2.Kernel()), "source", "0", "OUTPUT or INPUT"),
    (
        lambda m: m.load_kernel("body.0", 2, kernel_of(m, chunk_width=3, source_width=3)),
        "signature.chunk_width",
        "3",
        "must be the seed's 2",
    ),
    (
        lambda m: m.load_kernel("body.0", 2, kernel_of(m, dtype=kernel_pb2.DATA_TYPE_FLOAT16)),
        "signature.dtype",
        "DATA_TYPE_FLOAT16",
        "must be the seed's DATA_TYPE_FLOAT32",
    ),
    (
        lambda m: m.load_kernel(
            "body.0", 2, kernel_of(m, device_class=kernel_pb2.DEVICE_CLASS_CUDA)
        ),
        "signature.device_class",
        "DEVICE_CLASS_CUDA",
        "must be the seed's DEVICE_CLASS_CPU",
    ),
    *[
        (
            lambda m, v=v: m.load_kernel("body.0", 2, *weights_of(m, B=v)),
            "weights",
            text,
            "must",
        )
        for v, text in (
            (torch.zeros(2, 2).double(), "float64"),
            (torch.zeros(2, 2, device="meta"), "meta"),
            (torch.zeros(3, 2), "3"),
            (torch.full((2, 2), NAN), "finite"),
        )
    ],
    # ---- telemetry and what was saved
    *whole(
        lambda m, v: setattr(m, "telemetry_interval", v),
        [0, -1, 2.5, "1", None, NAN],
        "telemetry_interval",
        WHOLE,
    ),
    *whole(lambda m, v: m.collect_signals(v), [-1, 1.5, "x", None, 2**63], "epoch", WHOLE),
    (lambda m: m.restore(None, {}, {}), "bank", "NoneType", "must be of type bytes"),
    (lambda m: m.restore(b"x", {}, {}), "bank", "shorter", "not usable"),
    (lambda m: m.restore(m.bank.to_bytes(), {}, {}), "seed 0", "GRAFTING", "must be DORMANT"),
    (
        lambda m: m.restore(m.bank.to_bytes(), {}, {}, over=True),
        "slots",
        "[]",
        "the model has ['body.0', 'keys']",
    ),
    (
        lambda m: m.restore(
            m.bank.to_bytes(), {n: s.slot_state() for n, s in m.slots.items()}, {}, over=True
        ),
        "seed 0",
        "GRAFTING in the bank",
        "no kernel for it",
    ),
    (
        lambda m: m.restore(_C.SeedBank([2, 4]).to_bytes(), {}, {}, over=True),
        "bank",
        "6",
        "the model has 2 with 8",
    ),
    (lambda m: m.resume(None), "runtime", "NoneType", "must be of type ModelRuntime"),
    # ---- wrapping twice, and giving back what was not wrapped
    (lambda m: wrap(m), "model", "MorphableModel", "wrapped already"),
    (lambda m: wrap(m.host), "model", "Net", "wrapped already"),
    (lambda m: wrap(nn.Sequential(m.host.body)), "model", "Sequential", "wrapped already"),
    (lambda m: wrap(m.host.keys), "model", "Linear", "wrapped already"),
    (lambda m: esper.load("nowhere", m.host), "model", "Net", "wrapped already"),
    (lambda m: unwrap(m.host), "model", "Net", "must come from esper.wrap"),
    (lambda m: esper.save(m.host, "nowhere"), "model", "Net", "only a wrapped model"),
    # ---- calls that do not fit
    (lambda m: m(X[:, :5]), "shapes", "5", "cannot be multiplied"),
    (lambda m: m(X.double()), "dtype", "double", "same dtype"),
]


@pytest.mark.parametrize(("do", "field", "value", "rule"), WITH_A_MODEL)
def test_a_model_refuses_and_stays_as_it_is(do, field, value, rule):
    model = grown()
    before = picture(model)
    error = RuntimeError if field in ("shapes", "dtype") else ValueError  # those of torch
    with pytest.raises(error) as caught:
        do(model)
    text = str(caught.value).lower()
    assert field.lower() in text and value.lower() in text
    assert rule.lower() in text
    assert_unchanged(model, before)


class Wide(nn.Module):
    """A block whose width only a forward can tell."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 3), nn.ReLU())

    def forward(self, x):
        return self.block(x)


def fails(x):
    raise RuntimeError("the model's own error")


UNWRAPPED = [
    *whole(
        lambda m, v: wrap(m, seeds_per_layer=v),
        [0, -1, 2.5, "4", None, True, NAN, 10**9],
        "seeds_per_layer",
        WHOLE,
    ),
    (lambda m: wrap(m, "keys", seeds_per_layer=5), "seeds_per_layer", "5", "has 4 features"),
    (lambda m: wrap(m, "body.0", seeds_per_layer=65536), "seeds_per_layer", "65536", "has 8"),
    (lambda m: wrap(torch.jit.script(m.body)), "model", "RecursiveScriptModule", "scripted"),
    *whole(
        lambda m, v: wrap(m, cache_size_mb=v),
        [-1, 0.5, NAN, INF, "1", None],
        "cache_size_mb",
        WHOLE,
    ),
    *whole(lambda m, v: wrap(m, v), ["nope", 3, ""], "target_layers", ""),
    *whole(lambda m, v: wrap(m, ["body.0", v]), [3, None, "keys.x"], "target_layers", ""),
    (lambda m: wrap(m, []), "target_layers", "empty", "at least one layer"),
    (lambda m: wrap(m, nn.Conv2d), "target_layers", "Conv2d", "no module of the model is one"),
    (
        lambda m: wrap(m, Bridge("keys", "keys")),
        "target_layers",
        "keys",
        "from one module to another",
    ),
    (lambda m: wrap(m, Bridge("body.0", "no")), "target_layers", "no", "no module has such a name"),
    # a forward that fails midway: no slot, no hook is left
    (lambda m: wrap(m, example_inputs=X[:, :5]), "shapes", "5", "cannot be multiplied"),
    (lambda m: esper.load("nowhere", m), "nowhere", "", "no"),
]


@pytest.mark.parametrize(("do", "field", "value", "rule"), UNWRAPPED)
def test_a_host_is_not_wrapped_by_halves(do, field, value, rule):
    torch.manual_seed(0)
    host = Net()
    before = picture(host)
    with pytest.raises(RuntimeError if field == "shapes" else ValueError) as caught:
        do(host)
    text = str(caught.value)
    assert field in text and value in text and rule in text
    assert_unchanged(host, before)
    wrap(host)  # the error, which is still held, keeps nothing of the attempt alive


@pytest.mark.parametrize("given", [3, None, Net, nn.functional.relu])
def test_only_modules_are_wrapped(given):
    for do in (wrap, unwrap):
        with pytest.raises(ValueError, match=f"model is a {type(given).__name__}, but it must"):
            do(given)


@pytest.mark.parametrize("targets", [None, "auto"])
@pytest.mark.parametrize("make", [nn.Module, nn.ReLU, lambda: nn.Sequential(nn.ReLU())])
def test_a_module_without_slots_is_refused(make, targets):
    with pytest.raises(ValueError, match="target_layers is .*, but .*no "):
        wrap(make(), targets)


def test_more_seeds_than_features_are_refused_when_the_width_is_seen():
    host = Wide()
    model = wrap(host, "block", seeds_per_layer=4)
    before = picture(host.block[0])
    with pytest.raises(ValueError, match="seeds_per_layer is 4, but slot 'block' has 3 features"):
        model(X)
    assert model.slots["block"].width is None and not model.slots["block"].hooked
    assert_unchanged(host.block[0], before)
    with pytest.raises(ValueError, match="seeds_per_layer is 4, but slot 'block' has 3 features"):
        wrap(unwrap(model), "block", seeds_per_layer=4, example_inputs=X)
    assert wrap(host, "block", seeds_per_layer=3, example_inputs=X).slots["block"].width == 3


@pytest.mark.parametrize(
    ("make", "value", "rule"),
    [
        (lambda: nn.Linear(6, 4, dtype=torch.complex64), "no known floating-point type", ""),
        (lambda: nn.Linear(6, 4, device="meta"), "on meta", "must be on cpu, cuda"),
    ],
)
def test_hosts_that_no_kernel_can_compute_in_are_refused(make, value, rule):
    model = wrap(nn.Sequential(make()), preserve_original=False)
    before = model.bank.to_bytes()
    with pytest.raises(ValueError) as caught:
        model.germinate("0", 0, "lora", rank=1)
    assert "slot '0'" in str(caught.value)
    assert value in str(caught.value) and rule in str(caught.value)
    assert model.bank.to_bytes() == before and model.occupied_seeds() == []


def test_a_host_on_another_device_than_its_seeds_is_refused():
    model = grown()
    before = picture(model)
    kept = {name: parameter.data for name, parameter in model.host.named_parameters()}
    model.host.to("meta")
    with pytest.raises(ValueError, match=r"params\[0\] is on cpu, but must be on meta as h is"):
        model(X.to("meta"))
    for name, data in kept.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.host.get_submodule(module), leaf, nn.Parameter(data))
    assert model.bank.to_bytes() == before.bank
    with torch.no_grad():
        assert torch.equal(model(X), before.outputs[1])


@pytest.mark.parametrize("num_seeds", [5, 100])
def test_a_layer_with_more_seeds_than_features_is_refused(num_seeds):
    [site] = find_sites(nn.Sequential(nn.Linear(2, 4)), None)
    with pytest.raises(
        ValueError, match=f"seeds_per_layer is {num_seeds}, but slot '0' has 4 feat"
    ):
        KasminaLayer(site, num_seeds, 0)
    assert not site.module._forward_hooks


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(5, 7), "slot 'body.0': the output has 7 features, but must have 8"),
        (torch.zeros(5, 8, dtype=torch.int64), "slot 'body.0': the output holds no floating-point"),
        (torch.zeros(5, 8, dtype=torch.complex64), "slot 'body.0': the output holds no floating"),
        (None, "slot 'body.0': the output holds no floating-point tensor"),
        (torch.zeros(()), None),
    ],
)
def test_a_layer_refuses_outputs_that_are_no_slots(output, message):
    model = grown()
    before = picture(model)
    layer = model.slots["body.0"]
    with pytest.raises((ValueError, IndexError), match=message):
        layer(layer.module, (X,), {}, output)
    assert_unchanged(model, before)
