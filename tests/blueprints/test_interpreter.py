"""Every op of the interpreter against torch's own functions."""

import copy
import math
from collections.abc import Callable
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from esper.blueprints.builder import GraphBuilder
from esper.blueprints.builder import Plain
from esper.blueprints.builder import output
from esper.blueprints.checker import Layout
from esper.blueprints.errors import BlueprintError
from esper.blueprints.interpreter import ReferenceModule
from esper.blueprints.interpreter import reference_from_blueprint
from esper.blueprints.interpreter import reference_module
from esper.blueprints.library import get
from esper.blueprints.lowering import lower
from esper.blueprints.ops import OPS
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2

WIDTH = 6
SHAPES = {
    Layout.TOKENS: (4, WIDTH),
    Layout.SEQUENCE: (2, 5, WIDTH),
    Layout.PLANE_1D: (2, WIDTH, 5),
    Layout.PLANE_2D: (2, WIDTH, 5, 3),
}
Weights = Mapping[str, Tensor]
Expected = Callable[[Tensor, Weights], Tensor]


def place(layout: Layout = Layout.TOKENS, source: str = "OUTPUT") -> kernel_pb2.KernelSignature:
    planes = layout in (Layout.PLANE_1D, Layout.PLANE_2D)
    return kernel_pb2.KernelSignature(
        slot_kind=kernel_pb2.SLOT_KIND_CONV if planes else kernel_pb2.SLOT_KIND_BLOCK,
        chunk_width=WIDTH,
        source_width=WIDTH,
        source=blueprint_pb2.SeedSource.Value(f"SEED_SOURCE_{source}"),
        dtype=kernel_pb2.DATA_TYPE_FLOAT64,
        device_class=kernel_pb2.DEVICE_CLASS_CPU,
    )


def module_of(
    graph: GraphBuilder, value: blueprint_pb2.ValueRef, layout: Layout
) -> tuple[ReferenceModule, kernel_pb2.Kernel]:
    """Returns the interpreter of a graph with random parameters, from the kernel's lowering."""
    blueprint = blueprint_pb2.Blueprint(name="trial", graph=graph.returns(value))
    kernel = lower(blueprint, place(layout))
    generator = torch.Generator().manual_seed(3)
    weights = {
        spec.name: torch.randn(tuple(spec.shape), generator=generator, dtype=torch.float64)
        for spec in kernel.parameters
    }
    return reference_module(kernel, weights), kernel


def check_against(
    module: ReferenceModule, layout: Layout, expected: Callable[[Tensor, list[Tensor]], Tensor]
) -> None:
    """Compares value and gradients, and the traced module."""
    source = torch.randn(SHAPES[layout], dtype=torch.float64, requires_grad=True)
    parameters = list(module.parameters())
    actual, wanted = module(source), expected(source, parameters)
    torch.testing.assert_close(actual, wanted)
    dy = torch.randn_like(actual)
    leaves = [source, *parameters]
    grads = torch.autograd.grad(actual, leaves, dy, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, leaves, dy))
    traced = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(traced(source), actual, rtol=0, atol=0)


def _attend(x: Tensor, qkv: Tensor, out: Tensor, heads: int, causal: bool) -> Tensor:
    width = x.shape[-1]
    q, k, v = (x @ qkv).split(width, dim=-1)
    mixed = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(width // heads)
        if causal:
            later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            scores = scores.masked_fill(later, -math.inf)
        mixed.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(mixed, dim=-1) @ out


T, S, P1, P2 = Layout.TOKENS, Layout.SEQUENCE, Layout.PLANE_1D, Layout.PLANE_2D
Case = tuple[str, Layout, dict[str, Plain], Callable[[Tensor, list[Tensor]], Tensor]]
# Ops of one operand that keep its shape: op, layout, attributes, what torch says.
CASES: list[Case] = [
    ("linear", T, {"out": "D"}, lambda x, w: F.linear(x, w[0].T, w[1])),
    ("linear", S, {"out": "D", "bias": False}, lambda x, w: F.linear(x, w[0].T)),
    ("relu", T, {}, lambda x, w: F.relu(x)),
    ("gelu", T, {}, lambda x, w: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    ("silu", T, {}, lambda x, w: x / (1 + torch.exp(-x))),
    ("tanh", T, {}, lambda x, w: torch.tanh(x)),
    ("sigmoid", T, {}, lambda x, w: 1 / (1 + torch.exp(-x))),
    ("softmax", T, {}, lambda x, w: F.softmax(x, dim=1)),
    ("softmax", S, {"axis": 1}, lambda x, w: F.softmax(x, dim=1)),
    ("softmax", P2, {"axis": -2}, lambda x, w: F.softmax(x, dim=2)),
    ("layer_norm", T, {}, lambda x, w: F.layer_norm(x, (WIDTH,), w[0], w[1], 1e-5)),
    (
        "layer_norm",
        S,
        {"affine": False, "eps": 0.5},
        lambda x, w: (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + 0.5).sqrt(),
    ),
    (
        "rms_norm",
        T,
        {"eps": 0.5},
        lambda x, w: x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * w[0],
    ),
    ("rms_norm", T, {"affine": False}, lambda x, w: F.rms_norm(x, (WIDTH,), eps=1e-5)),
    (
        "group_norm",
        P2,
        {"groups": 3, "eps": 0.5},
        lambda x, w: F.group_norm(x, 3, w[0], w[1], 0.5),
    ),
    (
        "group_norm",
        P1,
        {"groups": "D", "affine": False},
        lambda x, w: F.instance_norm(x, eps=1e-5),
    ),
    ("conv1d", P1, {"out": "D", "kernel": 3}, lambda x, w: F.conv1d(x, w[0], w[1], padding=1)),
    (
        "conv1d",
        P1,
        {"out": "D", "kernel": 2, "dilation": 2, "bias": False, "groups": 2},
        lambda x, w: F.conv1d(x, w[0], padding=1, dilation=2, groups=2),
    ),
    ("conv2d", P2, {"out": "D", "kernel": 5}, lambda x, w: F.conv2d(x, w[0], w[1], padding=2)),
    (
        "conv2d",
        P2,
        {"out": "D", "kernel": 3, "dilation": 2, "groups": "D", "padding": 2},
        lambda x, w: F.conv2d(x, w[0], w[1], padding=2, dilation=2, groups=WIDTH),
    ),
    (
        "pool",
        P1,
        {"kernel": 3},
        lambda x, w: F.avg_pool1d(x, 3, 1, 1, count_include_pad=False),
    ),
    (
        "pool",
        P2,
        {"kernel": 3},
        lambda x, w: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    ),
    (
        "attention",
        S,
        {"heads": 2},
        lambda x, w: _attend(x, w[0], w[1], 2, causal=False),
    ),
    (
        "attention",
        S,
        {"causal": True, "heads": 3},
        lambda x, w: _attend(x, w[0], w[1], 3, causal=True),
    ),
    ("low_rank_matmul", T, {"out": "D", "rank": 2}, lambda x, w: x @ w[0] @ w[1] + w[2]),
    ("scale", T, {}, lambda x, w: x * w[0]),
    (
        "scale",
        P2,
        {"axis": 1, "bias": True},
        lambda x, w: x * w[0].view(-1, 1, 1) + w[1][:, None, None],
    ),
    ("scale", S, {"factor": -0.25}, lambda x, w: x * -0.25),
    ("dropout", T, {"p": 0.0}, lambda x, w: x),
]


@pytest.mark.parametrize(("op", "layout", "attributes", "expected"), CASES)
def test_op_equals_torch(
    op: str,
    layout: Layout,
    attributes: dict[str, Plain],
    expected: Callable[[Tensor, list[Tensor]], Tensor],
) -> None:
    graph = GraphBuilder(layout=layout)
    # A second node keeps the graph from being lowered to a native family.
    value = graph.node("scale", graph.node(op, graph.input, **attributes), factor=2.0)
    module, kernel = module_of(graph, value, layout)
    assert kernel.WhichOneof("lowering") == "graph"
    check_against(module, layout, lambda x, w: 2.0 * expected(x, w))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul", lambda a, b: a * b),
        ("div", lambda a, b: a / b),
    ],
)
def test_binary_ops_keep_their_order_and_broadcast(
    op: str, expected: Callable[[Tensor, Tensor], Tensor]
) -> None:
    graph = GraphBuilder()
    left, right = graph.node("tanh", graph.input), graph.node("sigmoid", graph.input)
    module, _ = module_of(graph, graph.node(op, left, right), T)
    check_against(module, T, lambda x, w: expected(x.tanh(), x.sigmoid()))
    graph = GraphBuilder()
    squashed = graph.node("sigmoid", graph.input)
    column = graph.node("mean", squashed, keepdim=True)
    module, _ = module_of(graph, graph.node(op, graph.input, column), T)
    check_against(module, T, lambda x, w: expected(x, x.sigmoid().mean(1, keepdim=True)))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("identity", lambda x: x),
        ("relu", F.relu),
        ("gelu", F.gelu),
        ("silu", F.silu),
        ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid),
    ],
)
def test_gate_activates_its_second_operand(
    activation: str, expected: Callable[[Tensor], Tensor]
) -> None:
    graph = GraphBuilder()
    bent = graph.node("tanh", graph.input)
    module, _ = module_of(graph, graph.node("gate", bent, graph.input, activation=activation), T)
    check_against(module, T, lambda x, w: x.tanh() * expected(x))


@pytest.mark.parametrize(
    ("op", "expected"), [("sum", torch.sum), ("mean", torch.mean), ("max", torch.amax)]
)
def test_reductions(op: str, expected: Callable[..., Tensor]) -> None:
    graph = GraphBuilder(layout=S)
    over_time = graph.node(op, graph.input, axis=1)
    spread = graph.node("reshape", over_time, shape=("N", 1, "D"))
    over_features = graph.node(op, graph.input, keepdim=True)
    scaled = graph.node("mul", graph.input, spread)
    module, _ = module_of(graph, graph.node("add", scaled, over_features), S)
    check_against(
        module,
        S,
        lambda x, w: x * expected(x, dim=1, keepdim=True) + expected(x, dim=2, keepdim=True),
    )


def test_matmul_permute_and_softmax_make_attention() -> None:
    graph = GraphBuilder(layout=S)
    turned = graph.node("permute", graph.input, axes=(0, 2, 1))
    scores = graph.node("softmax", graph.node("matmul", graph.input, turned))
    module, _ = module_of(graph, graph.node("matmul", scores, graph.input), S)
    check_against(module, S, lambda x, w: (x @ x.mT).softmax(-1) @ x)


def test_reshape_knows_the_sizes_of_the_moment() -> None:
    graph = GraphBuilder(layout=P2, width=WIDTH)
    flat = graph.node("reshape", graph.input, shape=("N", 2, 3, "H", "W"))
    turned = graph.node("permute", flat, axes=(0, 2, 1, 4, 3))
    turned = graph.node("permute", turned, axes=(0, 2, 1, 4, 3))
    back = graph.node("reshape", graph.node("tanh", turned), shape=("N", WIDTH, "H", "W"))
    module, _ = module_of(graph, back, P2)
    check_against(module, P2, lambda x, w: x.tanh())
    assert module(torch.zeros(0, WIDTH, 2, 9, dtype=torch.float64)).shape == (0, WIDTH, 2, 9)


def test_concat_and_split_keep_their_order() -> None:
    graph = GraphBuilder()
    joined = graph.node("concat", graph.input, graph.node("tanh", graph.input))
    parts = graph.node("split", joined, parts=4)
    swapped = graph.node("concat", output(parts, 3), output(parts, 0))
    module, _ = module_of(graph, swapped, T)
    check_against(module, T, lambda x, w: torch.cat([x.tanh()[:, 3:], x[:, :3]], dim=1))


def test_global_pool_feeds_squeeze_and_excite() -> None:
    graph = GraphBuilder(layout=P2)
    pooled = graph.node("pool", graph.input)
    mixed = graph.node("conv2d", pooled, out="D", kernel=1)
    module, kernel = module_of(graph, graph.node("gate", graph.input, mixed), P2)
    check_against(
        module,
        P2,
        lambda x, w: x * F.conv2d(x.mean((2, 3), keepdim=True), w[0], w[1]).sigmoid(),
    )
    assert kernel.flops_per_token == 0, "the pooled branch costs nothing per position"


def test_dropout_drops_in_training_only() -> None:
    graph = GraphBuilder()
    module, _ = module_of(graph, graph.node("dropout", graph.input, p=0.25), T)
    source = torch.ones(200, WIDTH, dtype=torch.float64)
    assert torch.equal(module.eval()(source), source)
    torch.manual_seed(0)
    dropped = module.train()(source)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert 0.2 < float((dropped == 0).double().mean()) < 0.3


def test_every_op_is_interpreted_here() -> None:
    composed = {"add", "sub", "mul", "div", "gate", "sum", "mean", "max", "matmul", "permute"}
    composed |= {"reshape", "concat", "split"}
    covered = {op for op, *_ in CASES} | composed
    assert covered == {spec.name for spec in OPS.values()}
    assert set(OPS) == set(blueprint_pb2.Op.values()) - {blueprint_pb2.OP_UNSPECIFIED}


@pytest.mark.parametrize("leading", [(), (3,), (2, 0), (2, 3, 4)])
def test_token_graphs_take_any_leading_axes(leading: tuple[int, ...]) -> None:
    module = reference_module(lower(get("norm_mlp"), place()))
    source = torch.randn(*leading, WIDTH, dtype=torch.float64)
    assert module(source).shape == source.shape


def test_token_graphs_work_on_channels_of_convolution_slots() -> None:
    first = reference_from_blueprint(get("norm_mlp"), place(P2))
    last = reference_from_blueprint(get("norm_mlp"), place(S))
    for parameter, other in zip(first.parameters(), last.parameters(), strict=True):
        parameter.data.normal_()
        other.data.copy_(parameter)
    image = torch.randn(2, WIDTH, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(first(image), last(image.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize(("layout", "shape"), [(S, (4, WIDTH)), (P2, (2, WIDTH, 5))])
def test_other_layouts_refuse_a_source_of_another_number_of_axes(
    layout: Layout, shape: tuple[int, ...]
) -> None:
    graph = GraphBuilder(layout=layout)
    module, _ = module_of(graph, graph.node("tanh", graph.input), layout)
    with pytest.raises(AssertionError, match="the seed needs a"):
        module(torch.zeros(shape, dtype=torch.float64))


NATIVE: list[tuple[str, dict[str, Plain], Expected]] = [
    ("noop", {}, lambda x, w: torch.zeros_like(x)),
    ("affine", {}, lambda x, w: x * w["w"] + w["b"]),
    ("lora", {"rank": 3}, lambda x, w: x @ w["A"] @ w["B"]),
    (
        "bottleneck",
        {"rank": 3, "activation": "silu"},
        lambda x, w: F.silu(x @ w["A"] + w["a"]) @ w["B"] + w["b"],
    ),
    ("widen", {"rank": 3}, lambda x, w: F.relu(x @ w["A"] + w["a"]) @ w["B"]),
    (
        "glu",
        {"rank": 3, "activation": "tanh"},
        lambda x, w: (torch.tanh(x @ w["A"]) * (x @ w["G"])) @ w["B"],
    ),
]


@pytest.mark.parametrize(("name", "hyperparameters", "expected"), NATIVE)
def test_native_families_mean_their_formula(
    name: str, hyperparameters: dict[str, int | float | str], expected: Expected
) -> None:
    blueprint = get(name, **hyperparameters)
    signature = place(source="INPUT" if name == "widen" else "OUTPUT")
    kernel = lower(blueprint, signature)
    assert kernel.WhichOneof("lowering") != "graph"
    generator = torch.Generator().manual_seed(5)
    weights = {
        spec.name: torch.randn(tuple(spec.shape), generator=generator, dtype=torch.float64)
        for spec in kernel.parameters
    }
    source = torch.randn(7, WIDTH, dtype=torch.float64)
    for module in (
        reference_module(kernel, weights),
        reference_from_blueprint(blueprint, signature, weights),
    ):
        assert [name for name, _ in module.named_parameters()] == [
            spec.name for spec in kernel.parameters
        ]
        torch.testing.assert_close(module(source), expected(source, weights))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("bottleneck", T), ("glu", S), ("norm_mlp", S), ("affine", T), ("depthwise", P2)],
)
def test_flops_per_token_are_what_torch_counts(name: str, layout: Layout) -> None:
    kernel = lower(get(name), place(layout))
    module = reference_module(kernel)
    source = torch.zeros(SHAPES[layout], dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        module(source)
    assert counter.get_total_flops() == kernel.flops_per_token * (source.numel() // WIDTH)


def test_copies_are_independent_and_gradients_pass_gradcheck() -> None:
    module = reference_module(lower(get("norm_mlp", rank=2), place()))
    for parameter in module.parameters():
        parameter.data.normal_()
    other = copy.deepcopy(module)
    next(other.parameters()).data.zero_()
    assert not torch.equal(next(other.parameters()), next(module.parameters()))
    source = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (source,))


def test_a_kernel_whose_fields_disagree_is_refused() -> None:
    kernel = lower(get("bottleneck"), place())
    kernel.parameters[1].shape[0] = 15
    with pytest.raises(BlueprintError, match=r"kernel.parameters\[1\].shape is '\[15\]': must be"):
        reference_module(kernel)
