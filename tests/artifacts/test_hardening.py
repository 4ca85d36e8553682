"""A hardened model is plain torch: same outputs, no Esper, and all of torch's tools work on it."""

import copy
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch import fx
from torch import nn

import esper
from esper.kasmina import MorphableModel

NewHost = Callable[..., nn.Module]
Plant = Callable[..., None]


def is_plain(module: nn.Module) -> bool:
    parts: list[object] = list(module.modules())
    parts += [hook for part in module.modules() for hook in part._forward_hooks.values()]
    return not any(type(part).__module__.startswith("esper") for part in parts)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_are_those_of_the_grown_model(
    grown: MorphableModel, tokens: Tensor, training: bool
) -> None:
    grown.train(training)
    expected = grown(tokens)
    plain = esper.harden(grown)
    assert is_plain(plain)
    assert type(plain) is type(grown.host)
    assert plain.training is training
    torch.testing.assert_close(plain(tokens), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert (plain(tokens) - grown.host(tokens)).abs().max() < 1e-5, "host still has its hooks"
    assert torch.equal(grown(tokens), expected), "the grown model is left as it was"


def test_only_seeds_that_count_are_kept(grown: MorphableModel) -> None:
    plain = esper.harden(grown)
    added = set(plain.state_dict()) - set(grown.host.state_dict())
    assert {name.rpartition("_")[0] for name in added if "norm" not in name} == {
        "block.graft0",
        "block.graft2",
        "block.0.graft1",
        "head.graft0",
        "head.graft1",
    }
    assert {name.partition("_")[0] for name in added if "norm" in name} == {"norm.graft1"}
    names = set(dict(plain.named_parameters(remove_duplicate=False)))
    assert names >= set(grown.host.state_dict()) - {"scale"}, "host names stay"
    counting = [
        p.numel()
        for slot, seed in grown.occupied_seeds()
        if grown.alpha(slot, seed) > 0
        for p in grown.seed_parameters(slot, seed)
    ]
    host = sum(p.numel() for p in grown.host.parameters())
    assert sum(p.numel() for p in plain.parameters()) == host + sum(counting)
    assert plain.head.weight is plain.embed.weight


def test_hardened_model_is_a_model_of_its_own(grown: MorphableModel, tokens: Tensor) -> None:
    expected = grown(tokens)
    plain = esper.harden(grown)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    plain(tokens).square().mean().backward()
    optimizer.step()
    after = dict(plain.named_parameters())
    for name in ("norm.weight", "block.graft0_A", "norm.graft1_n1_weight"):
        assert not torch.equal(before[name], after[name]), f"{name} must train"
    assert torch.equal(grown(tokens), expected)


def test_model_without_grafts_hardens_to_its_host(new_host: NewHost, tokens: Tensor) -> None:
    model = esper.wrap(new_host(), target_layers=["block"])
    model.train()
    model(tokens)
    plain = esper.harden(model)
    assert torch.equal(plain(tokens), new_host().train()(tokens))
    assert not any(module._forward_hooks for module in plain.modules())


def test_torch_tools_work_on_it(grown: MorphableModel, tokens: Tensor) -> None:
    plain = esper.harden(grown).eval()
    expected = plain(tokens)
    assert torch.equal(pickle.loads(pickle.dumps(plain))(tokens), expected)
    twin = copy.deepcopy(plain)
    doubled = {name: 2 * p for name, p in plain.named_parameters()}
    assert not torch.equal(torch.func.functional_call(plain, doubled, (tokens,)), expected)
    with torch.no_grad():
        twin.block.graft0_B.zero_()
    assert not torch.equal(twin(tokens), expected)
    assert torch.equal(plain(tokens), expected)
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), expected)
    traced = fx.symbolic_trace(plain)
    assert torch.equal(traced(tokens), expected)
    other = esper.harden(grown).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(tokens), expected)


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "esper":
            raise ImportError("esper is not to be imported")

sys.meta_path.insert(0, Block())
import torch
program = torch.export.load(sys.argv[1])
tokens, expected = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(program.module()(tokens), expected, atol=1e-5, rtol=1e-5)
more = torch.cat([tokens, tokens])
assert program.module()(more).shape == (10, 7, 11)
assert not [name for name in sys.modules if name.split(".")[0] == "esper"]
print("ran without esper")
"""


def test_exported_model_runs_where_there_is_no_esper(
    grown: MorphableModel, tokens: Tensor, tmp_path: Path
) -> None:
    plain = esper.harden(grown).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(plain, (tokens,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((tokens, grown.eval()(tokens).detach()), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, tmp_path / "model.pt2", tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "ran without esper", done.stderr


def test_loaded_model_hardens_before_it_ever_ran(
    grown: MorphableModel, new_host: NewHost, tokens: Tensor, tmp_path: Path
) -> None:
    esper.save(grown, tmp_path / "model")
    plain = esper.harden(esper.load(tmp_path / "model", new_host(seed=4))).eval()
    torch.testing.assert_close(plain(tokens), grown.eval()(tokens), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- unusual modules


class Wrapper(nn.Module):
    """Calls one module in an unusual way."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


class Pair(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.kind = kind

    def forward(self, x: Tensor, *, shift: float = 0.0) -> object:
        y = self.lin(x) + shift
        match self.kind:
            case "tuple":
                return y, x
            case "list":
                return [x.long(), y, x]
            case "dict":
                return {"mask": x > 0, "y": y, "x": x}
            case "ordered":
                return {"first": OrderedDict(y=y)}
            case "nested":
                return (x > 0, (y, x))
            case _:
                return Named(y, x)


class Named(NamedTuple):
    y: Tensor
    x: Tensor


def attend(module: nn.Module, x: Tensor) -> Tensor:
    mask = torch.ones(5, 5, dtype=torch.bool, device=x.device).triu(1)
    out, weights = module(x, x, value=x, attn_mask=mask, average_attn_weights=False)
    return out + weights.sum()


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "positional": (lambda: nn.Linear(6, 6), lambda m, x: m(x)),
    "keyword": (lambda: nn.Linear(6, 6), lambda m, x: m(input=x)),
    "used twice": (lambda: nn.Linear(6, 6), lambda m, x: m(torch.tanh(m(x)))),
    "weight read directly": (lambda: nn.Linear(6, 6), lambda m, x: m(x) @ m.weight),
    "attention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), attend),
    "keyword only option": (lambda: Pair("tuple"), lambda m, x: m(x, shift=2.0)[0]),
    "tuple": (lambda: Pair("tuple"), lambda m, x: m(x)[0] * m(x)[1]),
    "list": (lambda: Pair("list"), lambda m, x: m(x)[1] * m(x)[2]),
    "dict": (lambda: Pair("dict"), lambda m, x: m(x)["y"] * list(m(x).values())[2]),
    "nested": (lambda: Pair("nested"), lambda m, x: m(x)[1][0] * m(x)[1][1]),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True),
        lambda m, x: m(x),
    ),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("source", ["input", "output"])
def test_unusual_calls(kind: str, source: str, plant: Plant) -> None:
    make, call = UNUSUAL[kind]
    torch.manual_seed(0)
    host = Wrapper(make(), call).eval()
    x = torch.randn(3, 5, 6)
    bare = host(x)
    model = esper.wrap(host, target_layers=["inner"], seeds_per_layer=2)
    model(x)
    plant(model, "inner", 1, "bottleneck", rank=2, source=source)
    expected = model(x)
    assert not torch.equal(expected, bare)
    plain = esper.harden(model)
    assert is_plain(plain)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-5)


def test_parts_of_an_encoder_layer_survive_its_fast_path(plant: Plant) -> None:
    """In eval without gradients torch may take a fused path that calls no submodule."""
    torch.manual_seed(0)
    host = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True), 2
    ).eval()
    x = torch.randn(3, 5, 6)
    model = esper.wrap(host, target_layers=[nn.Linear, nn.MultiheadAttention], seeds_per_layer=2)
    model(x)
    plant(model, "layers.0.linear1", 0, "bottleneck", rank=2, source="input")
    plant(model, "layers.1.self_attn", 1, "bottleneck", rank=2)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(esper.harden(model)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("slot", "blueprint"),
    [
        ("0", "bottleneck"),
        ("0", "affine"),
        ("1", "affine"),
        ("2", "bottleneck"),
        ("2", "depthwise"),
        ("1", "depthwise"),
        ("2", "squeeze_excite"),
    ],
)
def test_channels_on_axis_one(slot: str, blueprint: str, plant: Plant) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
    )
    images = torch.randn(2, 2, 8, 8)
    model = esper.wrap(host, seeds_per_layer=2)
    model(images)
    bare = model.eval()(images)
    plant(model, slot, 1, blueprint)
    expected = model(images)
    assert not torch.equal(expected, bare)
    torch.testing.assert_close(esper.harden(model)(images), expected, atol=1e-5, rtol=1e-5)


def test_every_blueprint_hardens(plant: Plant) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    for blueprint in set(esper.blueprints.names()) - {"noop", "squeeze_excite", "depthwise"}:
        model = esper.wrap(nn.Sequential(nn.Linear(8, 8)), seeds_per_layer=2)
        bare = model(x)
        plant(model, "0", 0, blueprint)
        expected = model(x)
        assert not torch.equal(expected, bare), blueprint
        torch.testing.assert_close(esper.harden(model)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["named", "ordered"])
def test_output_that_a_graph_cannot_rebuild_is_refused(kind: str, plant: Plant) -> None:
    def call(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x)
        result: Tensor = out["first"]["y"] if kind == "ordered" else out.y
        return result

    host = Wrapper(Pair(kind), call)
    x = torch.randn(3, 6)
    model = esper.wrap(host, target_layers=["inner"])
    model(x)
    plant(model, "inner", 0, "affine")
    with pytest.raises(
        ValueError, match="'inner' returns a (Named|OrderedDict), but only a module"
    ):
        esper.harden(model)


def test_slot_that_never_ran_and_name_that_is_taken_are_refused(plant: Plant) -> None:
    host = nn.Sequential(nn.Linear(4, 4))
    host[0].graft0_w = 3
    model = esper.wrap(host, target_layers=["0"])
    plant(model, "0", 0, "affine")
    with pytest.raises(ValueError, match="'0' has never run"):
        esper.harden(model)
    model(torch.randn(2, 4))
    with pytest.raises(ValueError, match="0.graft0_w exists already"):
        esper.harden(model)


def test_plain_model_is_refused(new_host: NewHost) -> None:
    with pytest.raises(ValueError, match="model is a Net, but only a wrapped model"):
        esper.harden(new_host())


def test_a_graft_fed_by_a_later_input_is_refused() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, mask: Tensor, x: Tensor) -> Tensor:
            return self.layer(x) * mask

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Masked()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(torch.ones(6, dtype=torch.bool), x)

    for blueprint in ("bottleneck", "widen"):  # the one reads the output, the other the input
        model = esper.wrap(Host(), target_layers=["block"], seeds_per_layer=1)
        x = torch.randn(3, 6)
        model(x)
        model.germinate("block", 0, blueprint, rank=2)
        for state in ("TRAINING", "GRAFTING", "STABILIZATION"):
            model.advance("block", 0, state)
        if blueprint == "bottleneck":
            torch.testing.assert_close(esper.harden(model)(x), model(x))
            continue
        with pytest.raises(ValueError, match="slot 'block' has a graft that reads .* first input"):
            esper.harden(model)
