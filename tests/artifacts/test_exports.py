"""Hardened models of every family in torch's and ONNX's exchange formats, against the grown model.

Batches of other sizes are run than the one that was traced.
"""

import inspect

import onnxruntime
import pytest
import torch
from model_families import FAMILIES
from torch.utils._pytree import tree_leaves

import esper

pytestmark = pytest.mark.timeout(600)

STATES = ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FOSSILIZED")


def grown(family):
    """A grown model in eval mode."""
    torch.manual_seed(0)
    grafts = FAMILIES[family].grafts
    model = esper.wrap(FAMILIES[family].make(), [slot for slot, _, _ in grafts], seeds_per_layer=2)
    args, kwargs = FAMILIES[family].inputs(0)
    model(*args, **kwargs)
    generator = torch.Generator().manual_seed(4)
    for slot, blueprint, hyperparameters in grafts:
        model.germinate(slot, 1, blueprint, **hyperparameters)
        for state in STATES:
            model.advance(slot, 1, state)
        for parameter in model.seed_parameters(slot, 1):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def batches(family):
    """A batch to trace with, and one of another size."""
    args, kwargs = FAMILIES[family].inputs(0)
    larger = tuple(torch.cat([x, x.flip(0)]) for x in args)
    return (args, kwargs), (larger, {name: torch.cat([x, x]) for name, x in kwargs.items()})


def shapes_of(model, args, kwargs):
    """The batch of every input is free, under the name that the model gives the input."""
    names = list(inspect.signature(model.forward).parameters)
    return {name: {0: torch.export.Dim.DYNAMIC} for name in (*names[: len(args)], *kwargs)}


def assert_same(found, expected):
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_exports_a_hardened_model(family):
    model = grown(family)
    plain = esper.harden(model)
    traced, larger = batches(family)
    program = torch.export.export(plain, *traced, dynamic_shapes=shapes_of(plain, *traced))
    with torch.no_grad():
        for args, kwargs in (traced, larger):
            assert_same(program.module()(*args, **kwargs), model(*args, **kwargs))
            assert tree_leaves(model(*args, **kwargs))[0].shape[0] == len(args[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_takes_a_hardened_model(family, tmp_path):
    model = grown(family)
    plain = esper.harden(model)
    (args, kwargs), larger = batches(family)
    program = torch.onnx.export(
        plain,
        args,
        kwargs=kwargs,
        dynamo=True,
        dynamic_shapes=shapes_of(plain, args, kwargs),
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    with torch.no_grad():
        for given, named in ((args, kwargs), larger):
            feed = dict(zip(names, [x.numpy() for x in (*given, *named.values())], strict=True))
            assert_same(session.run(None, feed), model(*given, **named))
