"""The whole chain over real sockets: from a blueprint to equal outputs in another process."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save_file
from torch import nn

import esper
from esper import blueprints
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.kasmina import SeedLifecycleState
from esper.plane import EmbeddedPlane
from esper.plane import connect
from esper.urza.v1 import library_pb2

State = SeedLifecycleState

# Runs in a fresh process, which knows of the model nothing but its folder and the host's class.
LOADER = """
import sys
import torch
from safetensors.torch import load_file, save_file
from torch import nn
import esper

folder, inputs, outputs = sys.argv[1:]
host = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 8))
model = esper.load(folder, host).eval()
with torch.no_grad():
    save_file({"outputs": model(load_file(inputs)["inputs"])}, outputs)
"""


def test_from_a_blueprint_to_equal_outputs_in_another_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 8))
    model = esper.wrap(host, target_layers=["2"], seeds_per_layer=2)
    inputs = torch.randn(64, 6)
    targets = torch.sin(2 * inputs.sum(1, keepdim=True)) * torch.linspace(0.5, 1, 8)
    model(inputs)  # tells the slot's widths

    with EmbeddedPlane() as embedded, connect(embedded.address) as plane:
        # Submit a blueprint, compile it for the place, and fetch what was stored.
        blueprint = blueprints.get("widen", rank=8)
        stored = plane.urza.create_blueprint(blueprint)
        signature = model.signature("2", 1, blueprint_pb2.SEED_SOURCE_INPUT)
        compiled = plane.tezzeret.compile(stored.name, signature)
        assert compiled.validation.passed
        fetched = plane.urza.get_kernel(compiled.name)
        assert fetched.state == library_pb2.KERNEL_STATE_VALIDATED
        kernel: kernel_pb2.Kernel = fetched.kernel
        assert compiled.name == f"kernels/{blueprints.kernel_digest(kernel)}"

        # Germinate: the function of the model is untouched, to the bit.
        before = model(inputs)
        model.load_kernel("2", 1, kernel)
        model.advance("2", 1, State.TRAINING)
        assert torch.equal(model(inputs), before)

    # Train in isolation, graft, and make it permanent, with no plane left.
    grafted = model.seed_parameters("2", 1)
    born = [parameter.detach().clone() for parameter in grafted]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def steps(number: int) -> float:
        for _ in range(number):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            model.tick()
        return float(loss.detach())

    steps(10)
    assert not any(torch.equal(now, then) for now, then in zip(grafted, born, strict=True))
    model.advance("2", 1, State.GRAFTING)
    model.set_seed_alpha("2", 1, 0.5)
    steps(10)
    model.set_seed_alpha("2", 1, 1.0)
    for state in (State.STABILIZATION, State.EVALUATING, State.FOSSILIZED):
        model.advance("2", 1, state)
    with_seed = steps(50)
    with model.muted("2", 1), torch.no_grad():
        assert float(nn.functional.mse_loss(model(inputs), targets)) > 1.2 * with_seed

    # Save, and load in a process that has never seen the model.
    model.eval()
    esper.save(model, tmp_path / "model")
    save_file({"inputs": inputs}, tmp_path / "inputs.safetensors")
    arguments = [
        str(tmp_path / name) for name in ("model", "inputs.safetensors", "out.safetensors")
    ]
    subprocess.run([sys.executable, "-c", LOADER, *arguments], check=True, timeout=100)
    with torch.no_grad():
        here = model(inputs)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["outputs"], here)
    plain = esper.harden(model)
    assert not any(type(m).__module__.startswith("esper") for m in plain.modules())
    torch.testing.assert_close(plain(inputs), here, rtol=1e-5, atol=1e-5)
