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
def test_a_hardened_model_is_exported_by_torch_and_to_onnx(family, tmp_path):
    model = grown(family)
    plain = esper.harden(model)
    traced, larger = batches(family)
    program = torch.export.export(plain, *traced, dynamic_shapes=shapes_of(plain, *traced))
    ran = program.module()
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    with torch.no_grad():
        for args, kwargs in (traced, larger):
            expected = model(*args, **kwargs)
            assert len(tree_leaves(expected)[0]) == len(args[0])
            assert_same(ran(*args, **kwargs), expected)
            feed = dict(zip(names, [x.numpy() for x in (*args, *kwargs.values())], strict=True))
            assert_same(session.run(None, feed), expected)
