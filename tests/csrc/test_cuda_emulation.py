"""The CUDA kernels' own source, compiled for the CPU, gives what the CPU kernels give."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from slot_oracle import Slot
from torch import Tensor

from esper.kasmina import ops

HERE = Path(__file__).resolve().parent
SLOTS = ("A", "a", "G", "c", "B", "b")


def compiled(name: str, folder: Path) -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "g++")
    assert shutil.which(compiler), f"{compiler} is needed to build the native core as well"
    target = folder / f"{name}.so"
    flags = ["-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    if os.environ.get("ESPER_SANITIZE") == "1":
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    includes = f"-I{HERE.parent.parent / 'csrc'}"
    source = HERE / f"{name}.cpp"
    subprocess.run([compiler, *flags, includes, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return compiled("emulated_slot", tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> ctypes.CDLL:
    return compiled("emulated_fused", tmp_path_factory.mktemp("emulation"))


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    values = [None if t is None else address(t) for t in tensors]
    return (ctypes.c_void_p * len(values))(*values)


BOTTLENECKS = [
    {"source": source, "family": "bottleneck", "activation": activation, "rank": 3}
    | ({"gated": True, "gate_bias": True} if gated else {"hidden_bias": True})
    for source in ops.SOURCES
    for activation, gated in zip(ops.ACTIVATIONS, (0, 1, 0, 1, 0), strict=True)
]
SPATIAL = [
    {"source": "output", "family": "squeeze_excite", "activation": "gelu", "rank": 3},
    {"source": "input", "family": "squeeze_excite", "activation": "relu", "rank": 2},
    {"source": "output", "family": "depthwise", "activation": "silu", "window": 3},
    {"source": "input", "family": "depthwise", "activation": "relu", "window": 5},
]
KINDS = [
    *BOTTLENECKS,
    {"source": "output", "family": "affine"},
    *({**kind, "hidden_bias": True} for kind in SPATIAL),
]


@pytest.mark.parametrize(
    ("scalars", "broken"),
    [((0.0, 1.0, 0.0), False), ((0.4, 0.4, 0.4), True), ((1.0, 0.5, 1.0), False)],
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_emulated_kernels_match_the_cpu(library, kind, scalars, broken):
    torch.manual_seed(0)
    positions = (2, 3, 4)
    tokens, offset, d = 24, 2, 9
    slot = Slot(
        torch.randn(*positions, 14, dtype=torch.float64),
        torch.randn(*positions, d, dtype=torch.float64),
        torch.tensor([scalars]),
    )
    if broken:  # in one sample
        read = slot.h[..., offset:] if kind["source"] == "output" else slot.x
        read[1, 2, 1:3] = float("nan")
    slot.add(offset, d, 0, output_bias=True, **kind)
    (seed,) = slot.seeds
    slot = slot.with_grad()
    y, stats = slot.run(telemetry=True)
    dy = torch.randn_like(y)
    y.backward(dy)

    own = iter(slot.params)
    has = [True, seed.hidden_bias, seed.gated, seed.gate_bias, True, True]
    has[0] = seed.family != "affine"
    named = {name: next(own) for name, present in zip(SLOTS, has, strict=True) if present}
    window = (seed.window, seed.window)
    record = seed.pack()
    numbers = [offset, d, d, seed.rank, *record[3:7], tokens, 14, d, *positions, *window]
    numbers = (ctypes.c_longlong * len(numbers))(*numbers)
    values = (ctypes.c_float * 3)(*scalars)
    h, x = slot.h.detach(), slot.x.detach()
    before, gate, hidden = (torch.zeros(tokens, seed.rank).double() for _ in range(3))
    g, energy = torch.zeros(tokens, d).double(), torch.zeros(tokens).double()
    vectors, trust = torch.zeros(3, 2, d).double(), torch.zeros(2).double()
    scratch = [before, gate, hidden, g, energy, vectors, trust]
    memory = pointers([*(named.get(name) for name in SLOTS), h, x, *scratch])

    emulated, counted = h.clone(), torch.zeros_like(stats)
    library.emulated_forward(numbers, values, memory, address(emulated), address(counted))
    torch.testing.assert_close(emulated, y.detach(), equal_nan=True)
    torch.testing.assert_close(counted, stats, equal_nan=True)

    sends = scalars[2] != 0.0
    start = dy.clone() if seed.source == "output" else torch.zeros_like(x)
    grads = {name: torch.zeros_like(param) for name, param in named.items()}
    to = pointers([*(grads.get(name) for name in SLOTS), start if sends else None])
    library.emulated_backward(numbers, values, memory, address(dy), to)
    for name, param in named.items():
        torch.testing.assert_close(grads[name], param.grad)
    torch.testing.assert_close(slot.h.grad, start if seed.source == "output" else dy)
    if seed.source == "input" and sends:
        torch.testing.assert_close(slot.x.grad, start)


ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Both sides read and write the same elements; the fused kernels round the hidden layer and the
# weights as well. float32 stands for TF32, whose rounding is the hardware's and is not emulated.
CLOSE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}
FUSED = [
    # source, activation, gated, rank, offset, d, D, D_in
    ("output", "gelu", False, 16, 64, 64, 192, 8),
    ("output", "silu", True, 5, 2, 9, 14, 8),
    ("input", "relu", False, 40, 0, 96, 96, 80),
    ("input", "tanh", True, 17, 3, 70, 75, 33),
    ("output", "identity", False, 64, 0, 130, 130, 8),
]


def near(ours: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert torch.equal(ours.isfinite(), wanted.isfinite())
    ours, wanted = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (ours, wanted))
    scale = max(1e-3, float(wanted.abs().max()))
    assert float((ours - wanted).abs().max()) <= tolerance * scale


@pytest.mark.parametrize(
    ("scalars", "broken"),
    [((0.0, 1.0, 0.0), False), ((0.4, 0.4, 0.4), True), ((1.0, 0.5, 1.0), False)],
)
@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: "-".join(map(str, kind)))
@pytest.mark.parametrize("dtype", list(ELEMENTS), ids=str)
def test_fused_kernels_match_the_cpu(fused, dtype, kind, scalars, broken):
    torch.manual_seed(0)
    source, activation, gated, rank, offset, d, width, input_width = kind
    if dtype != torch.float32 and activation == "relu":
        activation = "gelu"  # rounding turns some units of a relu on or off
    tokens = 150  # the last tile is not full
    slot = Slot(
        torch.randn(tokens, width), torch.randn(tokens, input_width), torch.tensor([scalars])
    )
    slot.add(
        offset,
        d,
        0,
        source=source,
        family="bottleneck",
        activation=activation,
        rank=rank,
        gated=gated,
        gate_bias=gated,
        hidden_bias=True,
        output_bias=True,
    )
    slot.params = [p / max(1.0, p.shape[0] ** 0.5) for p in slot.params]
    if broken:
        read = slot.h[:, offset:] if source == "output" else slot.x
        read[70, 1], read[149, 2] = float("nan"), float("inf")
    slot.h, slot.x = slot.h.to(dtype), slot.x.to(dtype)
    (seed,) = slot.seeds
    slot = slot.with_grad()
    y, stats = slot.run(telemetry=True)
    dy = torch.randn_like(y)
    y.backward(dy)

    own = iter(slot.params)
    has = [True, True, gated, gated, True, True]
    named = {name: next(own) for name, present in zip(SLOTS, has, strict=True) if present}
    source_width = d if source == "output" else input_width
    sends = int(scalars[2] != 0.0)
    numbers = [ELEMENTS[dtype], offset, d, source_width, rank, seed.pack()[3], seed.pack()[5]]
    numbers += [int(gated), tokens, width, input_width, sends]
    numbers = (ctypes.c_longlong * len(numbers))(*numbers)
    values = (ctypes.c_float * 3)(*scalars)
    h, x = slot.h.detach(), slot.x.detach()
    energy = torch.zeros(tokens).double()
    memory = pointers([*(named.get(name) for name in SLOTS), h, x, energy])

    ours, counted = h.clone(), torch.zeros_like(stats)
    fused.fused_forward(numbers, values, memory, address(ours), address(counted))
    near(ours, y.detach(), CLOSE[dtype])
    near(counted, stats, CLOSE[dtype])

    grads = {name: torch.zeros_like(param) for name, param in named.items()}
    dh, dx = dy.clone(), torch.zeros_like(x)
    to = pointers([*(grads.get(name) for name in SLOTS), dh, dx])
    fused.fused_backward(numbers, values, memory, address(dy), to)
    for name, param in named.items():
        near(grads[name], param.grad, CLOSE[dtype])
    near(dh, slot.h.grad, CLOSE[dtype])
    if source == "input" and sends:
        near(dx, slot.x.grad, CLOSE[dtype])
