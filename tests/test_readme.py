"""What the README shows runs, and what it says is so."""

import asyncio
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Protocol

import grpc
import pytest
import torch
from google.protobuf.descriptor import MethodDescriptor
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset

import esper
from esper.oona.v1 import event_pb2
from esper.plane import EmbeddedPlane
from esper.plane import connect
from esper.plane.contract import FILES
from esper.tolaria import tasks

ROOT = Path(__file__).parents[1]


class Server(Protocol):
    """What `start_server` returns."""

    address: str


README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def plane() -> Iterator[str]:
    with EmbeddedPlane() as embedded:
        yield embedded.address


def new_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = tasks.get("digits")
    train, validation = (
        TensorDataset(part.inputs, part.targets) for part in (task.train, task.validation)
    )
    names: dict[str, object] = {
        "net": new_net(),
        "new_net": new_net,
        "train_loader": DataLoader(train, batch_size=64, shuffle=True),
        "val_loader": DataLoader(validation, batch_size=64),
    }
    blocks = fenced(README, "python")
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        run = names["run"]
        assert len(run.history.epochs) == 10  # type: ignore[attr-defined]
        names["net"] = new_net()
    inputs = task.test.inputs
    again, plain = names["again"], names["plain"]
    assert isinstance(again, nn.Module) and isinstance(plain, nn.Module)
    torch.testing.assert_close(plain(inputs), again(inputs), atol=1e-5, rtol=1e-5)
    assert task.accuracy(again, task.validation) > 0.6


def test_user_guide_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

    page = (ROOT / "docs/user-guide.md").read_text()
    blocks = fenced(page, "python")
    wrapping, by_hand, lightning, huggingface, averages, checkpoints, data, *others = blocks
    processes, configuration = others
    names: dict[str, object] = {"esper": esper, "torch": torch, "net": Net()}
    exec(wrapping, names)
    model = names["model"]
    assert isinstance(model, esper.MorphableModel)
    assert list(model.slots) == ["blocks.0.mlp", "blocks.0.mlp.0", "blocks.1.mlp", "blocks.1.mlp.0"]
    grown = esper.wrap(tasks.get("digits").host())
    exec(by_hand, {"model": grown})
    assert grown.seed_state("net.0", 0).name == "CULLED"
    trainer = {"Trainer": lambda *args, **kwargs: kwargs["callbacks"]}
    digits = tasks.get("digits")
    exec(lightning, {**trainer, "batches": digits.held_out_batches(), "sample_loss": digits.loss})
    taken = {"esper": esper, "net": digits.host(), "TrainingArguments": lambda *_, **__: None}
    sample = {"batches": digits.held_out_batches(), "sample_loss": digits.loss}
    exec(huggingface, {**trainer, **taken, **sample})
    exec(configuration, names)
    assert isinstance(names["config"], esper.EsperConfig)
    monkeypatch.chdir(tmp_path)
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    training = {
        "esper": esper,
        "model": grown,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "val_batches": digits.held_out_batches(),
        "loss": digits.loss,
        "mean_loss": 1.0,
    }
    assert "30" in checkpoints
    exec(checkpoints.replace("30", "2"), training)  # it shows the loop, and trains nothing
    assert len(list((tmp_path / "runs" / "mine").iterdir())) == 1
    session = training["session"]
    assert isinstance(session, esper.tolaria.Session)
    session.close()
    average = {
        "GrowingAverage": esper.tolaria.GrowingAverage,
        "get_ema_multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn,
    }
    exec(averages, {**training, **average})
    assert "session(..., " in data
    arguments = "model, optimizer, epochs=2, held_out=val_batches, loss=loss"
    nowhere = "plane='unix:/nonexistent/plane.sock'"
    example = data.replace("session(...", f"session({arguments}, {nowhere}")
    place = {
        **training,
        "ResumableSampler": esper.tolaria.ResumableSampler,
        "data": TensorDataset(digits.train.inputs, digits.train.targets),
        "DataLoader": DataLoader,
        "checkpoints": esper.tolaria.Checkpoints(tmp_path / "runs" / "none"),
    }
    exec(example.replace("30", "2").replace("num_workers=2", "num_workers=0"), place)
    session, sampler = place["session"], place["sampler"]
    assert isinstance(session, esper.tolaria.Session)
    session.close()
    assert isinstance(sampler, esper.tolaria.ResumableSampler)
    assert sampler.epoch == 2
    steps = {
        **training,
        "net": digits.host(),
        "torch": torch,
        "checkpoints": esper.tolaria.Checkpoints(tmp_path / "runs" / "shared"),
        "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel,
        "my_part_of": lambda epoch: digits.train_batches(0, epoch)[:2],
    }
    start = "torch.distributed.init_process_group()"
    assert start in processes
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    alone = "init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)"
    example = processes.replace(start, f"torch.distributed.{alone}").replace("30", "2")
    try:
        exec(example, steps)
    finally:
        torch.distributed.destroy_process_group()
    session = steps["session"]
    assert isinstance(session, esper.tolaria.Session)
    session.close()
    assert (session.epoch, session.step) == (2, 4)


def test_operations_example_runs(start_server: Callable[..., Server]) -> None:
    (example,) = fenced((ROOT / "docs/operations.md").read_text(), "python")
    names: dict[str, object] = {}
    exec(example, names)
    fetch = names["fetch"]
    assert callable(fetch)
    server = start_server("urza")
    with connect(server.address, timeout_s=20) as connection:
        blobs = [b"one", b"two"]
        digests = [connection.urza.write_blob(blob) for blob in blobs]
    assert asyncio.run(fetch(server.address, digests)) == blobs


def test_first_example_is_as_short_as_promised() -> None:
    lines = [line for line in fenced(README, "python")[0].splitlines() if line.strip()]
    assert len([line for line in lines if re.search(r"# [123]$", line)]) == 3
    loop = lines[lines.index(next(line for line in lines if "esper.wrap" in line)) :]
    assert len(loop) <= 10


def test_listed_rpcs_are_those_that_answer_unimplemented(plane: str) -> None:
    stated = {
        f"/{service}/{method}"
        for service, methods in re.findall(r"^- `(esper\.[\w.]+)`: ((?:.|\n  )+)$", README, re.M)
        for method in re.findall(r"`([A-Z]\w+)`", methods)
    }
    found = set()
    with connect(plane, timeout_s=20) as connection:
        for file in FILES:
            for service in file.services_by_name.values():
                channel = connection.channel("urza")  # one server serves them all
                for method in service.methods:
                    path = f"/{service.full_name}/{method.name}"
                    if answer(channel, path, method) == grpc.StatusCode.UNIMPLEMENTED:
                        found.add(path)
    assert stated == found


def answer(channel: grpc.Channel, path: str, method: MethodDescriptor) -> grpc.StatusCode:
    """Status of a call with one empty message."""
    make = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    call = make(path, request_serializer=bytes, response_deserializer=bytes)
    try:
        response = call(iter([b""]) if method.client_streaming else b"", timeout=10)
        if method.server_streaming:
            next(response, None)
            response.cancel()
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def test_grpcurl_examples_work(start_server: Callable[..., Server]) -> None:
    """`buf curl`, a development requirement, makes the same calls as grpcurl."""
    server = start_server("all", listen="127.0.0.1:0")
    with connect(server.address, timeout_s=20) as connection:
        connection.oona.publish("system.events.lifecycle", event_pb2.LifecycleEvent(slot="net.0"))
    commands = [
        shlex.split(line)
        for block in fenced(README, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("grpcurl ")
    ]
    assert len(commands) == 4
    buf = Path(sys.executable).with_name("buf")
    for _, plain, *rest in commands:
        assert plain == "-plaintext"
        data = ["-d", rest[1]] if rest[0] == "-d" else []
        place, name = rest[-2:]
        assert place == "127.0.0.1:50051"
        target = f"http://{server.address}"
        options = ["--list-methods"] if name == "list" else data
        url = target if name == "list" else f"{target}/{name}"
        process = subprocess.Popen(
            [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *options, url],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        said = process.stdout.readline()
        process.kill()  # a subscription has no end
        process.communicate()
        assert said.startswith("esper." if name == "list" else "{"), (name, said)


def test_cli_examples_parse() -> None:
    commands = [
        shlex.split(line.partition("#")[0])
        for page in PAGES
        for block in fenced(page.read_text(), "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if re.match(r"(\.venv/bin/)?esper ", line)
    ]
    assert len(commands) >= 3
    for command in commands:
        module = import_module(f"esper.cli.{command[1]}")
        known = {option for parameter in module.command.params for option in parameter.opts}
        assert {part.partition("=")[0] for part in command if part.startswith("--")} <= known


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_paths_and_names_in_the_docs_exist() -> None:
    """A path or a dotted esper name that a page shows in code marks is there."""
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text()):
            if re.fullmatch(r"(csrc|docs|esper|proto|services|tests)/[\w/.-]+", code):
                assert (ROOT / code).exists(), f"{page.name}: {code}"
            elif re.fullmatch(r"esper(\.[a-z]\w*)*(\.[A-Z]\w*)?", code) and ".v1" not in code:
                resolve(code)


def resolve(name: str) -> None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: object = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return
    raise AssertionError(name)
