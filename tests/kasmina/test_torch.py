"""Wrapped models under torch's own machinery: compile, export, autocast, calls, copies."""

import copy

import pytest
import torch
from model_families import FAMILIES
from seed_host import to_state
from torch import nn
from torch._dynamo.testing import CompileCounter

import esper
from esper.kasmina import wrap


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


SLOT_FORWARD = torch.ops.esper.slot_forward.default
X = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def grown(state="GRAFTING", dtype=torch.float32):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(Block(), Block()).to(dtype), seeds_per_layer=2)
    model(X.to(dtype))
    to_state(model, "0.mlp.0", 0, state)
    to_state(model, "1.mlp.2", 1, state, "widen", rank=3)
    return model


def step(model, forward=None):
    model.zero_grad()
    y = (model if forward is None else forward)(X)
    y.float().square().mean().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_compiled_models_have_no_graph_breaks_and_follow_the_lifecycle():
    model = grown("GRAFTING")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for alpha in (0.25, 0.5, 1.0):
        for at in (("0.mlp.0", 0), ("1.mlp.2", 1)):
            model.set_seed_alpha(*at, alpha)
        y, gradients = step(model, compiled)
        expected, plain = step(model)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradients, plain)
        assert counter.frame_count == 1, "alpha is data"
    for stage in ("STABILIZATION", "EVALUATING", "FINE_TUNING"):
        for at in (("0.mlp.0", 0), ("1.mlp.2", 1)):
            model.advance(*at, stage)
        torch.testing.assert_close(compiled(X), model(X))
        assert counter.frame_count == 1, "so are the scalars of a state"
    to_state(model, "0.norm", 1, "FINE_TUNING")
    torch.testing.assert_close(compiled(X), model(X))
    torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == 2, "a new seed is one new graph"
    model.advance("0.norm", 1, "CULLED")
    torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count <= 3


@pytest.mark.slow
def test_inductor_computes_the_same():
    model = grown("FINE_TUNING")
    y, gradients = step(model, torch.compile(model, fullgraph=True))
    expected, plain = step(model)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["residual convolutions", "transformer decoder", "perceptron"])
def test_families_compile_whole_and_once_for_each_structure(family):
    """With seeds that run natively and in the interpreter, in training and in eval mode."""
    torch.manual_seed(0)
    grafts = FAMILIES[family].grafts
    model = wrap(FAMILIES[family].make(), [slot for slot, _, _ in grafts], seeds_per_layer=2)
    args, kwargs = FAMILIES[family].inputs(0)
    model(*args, **kwargs)
    for slot, blueprint, hyperparameters in grafts:
        to_state(model, slot, 1, "GRAFTING", blueprint, **hyperparameters)
    still(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)

    def assert_same(frames):
        results = []
        for forward in (compiled, model):
            model.zero_grad()
            y = forward(*args, **kwargs)
            y.square().mean().backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append((y.detach(), gradients))
        (y, gradients), (expected, plain) = results
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        for name, gradient in gradients.items():  # zeros where eager has none
            wanted = plain.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)
        assert plain.keys() <= gradients.keys()
        assert counter.frame_count == frames

    for alpha in (0.0, 0.25, 1.0):
        for slot, _, _ in grafts:
            model.set_seed_alpha(slot, 1, alpha)
        assert_same(frames=1)
    for stage in ("STABILIZATION", "EVALUATING", "FINE_TUNING"):
        for slot, _, _ in grafts:
            model.advance(slot, 1, stage)
        assert_same(frames=1)
    to_state(model, grafts[0][0], 0, "FINE_TUNING", "lora")
    assert_same(frames=2)
    assert_same(frames=2)


def still(model):
    """Takes the noise out of a host; statistics of a batch norm would change from call to call."""
    for module in model.host.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None


def test_a_model_with_living_seeds_is_exported_as_it_is_at_that_moment():
    model = grown("GRAFTING").eval()
    to_state(model, "0.norm", 0, "FINE_TUNING", "norm_mlp")  # in the interpreter
    model.set_seed_alpha("0.mlp.0", 0, 0.5)
    expected = model(X)
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (X,), dynamic_shapes=((batch,),), strict=False)
    assert sum(node.target is SLOT_FORWARD for node in program.graph.nodes) == 2
    names = set(program.state_dict)
    assert {name for name, _ in model.named_parameters()} <= names
    ran = program.module()
    torch.testing.assert_close(ran(X), expected)
    torch.testing.assert_close(ran(torch.cat([X, X]))[5:], expected)
    # The program is of its own: the model lives on, and trains on.
    assert torch.equal(model(X), expected)
    model.set_seed_alpha("0.mlp.0", 0, 0.9)
    assert not torch.allclose(model(X), expected)
    model.cull("1.mlp.2", 1)
    torch.testing.assert_close(ran(X), expected)
    torch.testing.assert_close(program.run_decompositions().module()(X), expected)
    step(model.train())


def test_strict_export_of_living_seeds_names_the_ways_out():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="strict=False, or export esper.hard"):
        torch.export.export(grown("FINE_TUNING").eval(), (X,), strict=True)


def test_hardened_and_sleeping_models_are_exported():
    model = grown("FINE_TUNING").eval()
    program = torch.export.export(esper.harden(model), (X,))
    torch.testing.assert_close(program.module()(X), model(X))
    bare = wrap(nn.Sequential(Block())).eval()
    torch.testing.assert_close(torch.export.export(bare, (X,)).module()(X), bare(X))


@pytest.mark.parametrize("state", ["TRAINING", "FINE_TUNING"])
def test_autocast(state):
    model = grown(state)
    bare = copy.deepcopy(model.host)
    for module in bare.modules():
        module._forward_hooks.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(X)
        plain = bare(X)
    assert y.dtype == plain.dtype
    if state == "TRAINING":
        assert torch.equal(y, plain)
    else:
        assert not torch.equal(y, plain)
        torch.testing.assert_close(y.float(), model(X), rtol=0.1, atol=0.1)
    y.float().square().mean().backward()
    for at in (("0.mlp.0", 0), ("1.mlp.2", 1)):
        for parameter in model.seed_parameters(*at):
            assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype


def test_functional_call_uses_the_given_parameters():
    model, other = grown("FINE_TUNING"), grown("FINE_TUNING")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    y = torch.func.functional_call(model, given, (X,))
    torch.testing.assert_close(y, other(X))
    y.square().mean().backward()
    _, expected = step(other)
    for name, parameter in given.items():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_gradcheck_of_a_wrapped_model():
    model = grown("FINE_TUNING", torch.float64)
    names = [name for name, _ in model.named_parameters() if "grafts" in name]
    assert len(names) >= 4

    def call(x, *seed_parameters):
        given = dict(zip(names, seed_parameters, strict=True))
        return torch.func.functional_call(model, given, (x,))

    x = X[:1, :2].double().requires_grad_()
    parameters = [model.get_parameter(name) for name in names]
    model.requires_grad_(False)
    values = [p.detach().clone().requires_grad_() for p in parameters]
    assert torch.autograd.gradcheck(call, (x, *values))


def test_a_copy_steps_like_its_original():
    model = grown("FINE_TUNING")
    clone = copy.deepcopy(model)
    for one in (model, clone):
        optimizer = torch.optim.Adam(one.parameters(), lr=0.1)
        for _ in range(3):
            step(one)
            optimizer.step()
    for (name, a), (_, b) in zip(model.named_parameters(), clone.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.data_ptr() != b.data_ptr()
