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


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "g++")
    assert shutil.which(compiler), f"{compiler} is needed to build the native core as well"
    target = tmp_path_factory.mktemp("emulation") / "slot.so"
    flags = ["-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    if os.environ.get("ESPER_SANITIZE") == "1":
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    includes = f"-I{HERE.parent.parent / 'csrc'}"
    source = HERE / "emulated_slot.cpp"
    subprocess.run([compiler, *flags, includes, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


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
