"""The CUDA kernels' own source, compiled for the CPU, gives what the CPU kernels give."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esper.kasmina import ops
from esper.kasmina.ops import SeedPlan

HERE = Path(__file__).resolve().parent
SLOTS = ("A", "a", "G", "c", "B", "b")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "g++")
    assert shutil.which(compiler), f"{compiler} is needed to build the native core as well"
    target = tmp_path_factory.mktemp("emulation") / "slot.so"
    flags = ["-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    includes = f"-I{HERE.parent.parent / 'csrc'}"
    source = HERE / "emulated_slot.cpp"
    subprocess.run([compiler, *flags, includes, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    values = [None if t is None else address(t) for t in tensors]
    return (ctypes.c_void_p * len(values))(*values)


KINDS = [
    *(
        {"source": source, "family": "bottleneck", "activation": activation, "rank": 3}
        | ({"gated": True, "gate_bias": True} if gated else {"hidden_bias": True})
        for source in ops.SOURCES
        for activation, gated in zip(ops.ACTIVATIONS, (0, 1, 0, 1, 0), strict=True)
    ),
    {"source": "output", "family": "affine"},
]


@pytest.mark.parametrize("scalars", [(0.0, 1.0, 0.0), (0.4, 0.4, 0.4), (1.0, 0.5, 1.0)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_emulated_kernels_match_the_cpu(library, kind, scalars):
    torch.manual_seed(0)
    tokens, width, input_width, offset, d = 11, 14, 5, 2, 9
    h = torch.randn(tokens, width, dtype=torch.float64)
    x = torch.randn(tokens, input_width, dtype=torch.float64)
    seed = SeedPlan(row=0, offset=offset, width=d, first_param=0, output_bias=True, **kind)
    source_width = input_width if seed.source == "input" else d
    (h[:, offset:][4:6] if seed.source == "output" else x[4:6]).fill_(float("nan"))  # contained
    shapes = {"B": (seed.rank, d) if seed.family == "bottleneck" else (d,), "b": (d,)}
    if seed.family == "bottleneck":
        shapes["A"] = (source_width, seed.rank)
        if seed.gated:
            shapes |= {"G": (source_width, seed.rank), "c": (seed.rank,)}
        if seed.hidden_bias:
            shapes["a"] = (seed.rank,)
    named = {n: torch.randn(shapes[n], dtype=torch.float64) for n in SLOTS if n in shapes}
    params = [p.requires_grad_() for p in named.values()]
    rows = torch.tensor([scalars])

    host, source = h.clone().requires_grad_(), x.clone().requires_grad_()
    y, stats = ops.slot_forward(host, source, params, rows, seed.pack(), True)
    dy = torch.randn_like(y)
    y.backward(dy)

    record = seed.pack()
    numbers = [offset, d, source_width, seed.rank, *record[3:7], tokens, width, input_width]
    numbers = (ctypes.c_longlong * len(numbers))(*numbers)
    values = (ctypes.c_float * 3)(*scalars)
    before, gate, hidden = (torch.zeros(tokens, seed.rank).double() for _ in range(3))
    g, energy = torch.zeros(tokens, d).double(), torch.zeros(tokens).double()
    memory = pointers([*(named.get(n) for n in SLOTS), h, x, before, gate, hidden, g, energy])

    emulated, counted = h.clone(), torch.zeros_like(stats)
    library.emulated_forward(numbers, values, memory, address(emulated), address(counted))
    torch.testing.assert_close(emulated, y.detach(), equal_nan=True)
    torch.testing.assert_close(counted, stats, equal_nan=True)

    sends = scalars[2] != 0.0
    start = dy.clone() if seed.source == "output" else torch.zeros_like(x)
    grads = {n: torch.zeros_like(p) for n, p in named.items()}
    to = pointers([*(grads.get(n) for n in SLOTS), start if sends else None])
    library.emulated_backward(numbers, values, memory, address(dy), to)
    for name, param in named.items():
        torch.testing.assert_close(grads[name], param.grad)
    torch.testing.assert_close(host.grad, start if seed.source == "output" else dy)
    if seed.source == "input" and sends:
        torch.testing.assert_close(source.grad, start)
