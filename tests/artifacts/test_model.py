"""A saved model comes back as it was, bit for bit, or not at all."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch import nn

import esper
from esper.artifacts import ModelFolderError
from esper.artifacts import read_architecture
from esper.common.v1 import lifecycle_pb2
from esper.kasmina import MorphableModel
from esper.tolaria.history import LifecycleEvent

NewHost = Callable[..., nn.Module]
FILES = ("README.md", "architecture.json", "growth_history.jsonl", "weights.safetensors")


@pytest.fixture
def folder(tmp_path: Path, grown: MorphableModel) -> Path:
    esper.save(grown, tmp_path / "model")
    return tmp_path / "model"


def seeds(model: MorphableModel) -> list[tuple[str, int]]:
    return [(slot, seed) for slot, layer in model.slots.items() for seed in range(layer.num_seeds)]


def resign(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Edits architecture.json and makes its digest right again, as an attacker could."""
    path = folder / "architecture.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    change(document)
    text = json.dumps(document, separators=(",", ":"))
    document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(document))


def untouched(host: nn.Module, before: dict[str, Tensor]) -> bool:
    hooks = any(module._forward_hooks for module in host.modules())
    same = all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    return same and not hooks


# ---------------------------------------------------------------- the round trip


@pytest.mark.parametrize("training", [False, True])
def test_loaded_model_computes_the_same_bits(
    folder: Path, grown: MorphableModel, new_host: NewHost, tokens: Tensor, training: bool
) -> None:
    model = esper.load(folder, new_host(seed=8))
    expected = grown.train(training)(tokens)
    assert not torch.equal(new_host()(tokens), expected), "the grafts must count"
    assert torch.equal(model.train(training)(tokens), expected)
    assert model.host.head.weight is model.host.embed.weight
    assert torch.equal(model.host.scale, grown.host.scale)


def test_loaded_model_has_the_same_seeds(
    folder: Path, grown: MorphableModel, new_host: NewHost
) -> None:
    model = esper.load(folder, new_host(seed=8))
    assert list(model.slots) == list(grown.slots)
    assert model.bank.to_bytes() == grown.bank.to_bytes()
    assert {grown.seed_state(*at).name for at in seeds(grown)} >= {
        "DORMANT",
        "GERMINATED",
        "TRAINING",
        "GRAFTING",
        "STABILIZATION",
        "FINE_TUNING",
        "FOSSILIZED",
        "CULLED",
    }
    for at in seeds(grown):
        assert model.seed_state(*at) == grown.seed_state(*at)
        assert model.alpha(*at) == grown.alpha(*at)
        assert model.kernel_of(*at) == grown.kernel_of(*at)
        for mine, theirs in zip(
            model.seed_parameters(*at), grown.seed_parameters(*at), strict=True
        ):
            assert torch.equal(mine, theirs)
            assert mine.requires_grad == theirs.requires_grad
    assert model.num_parameters() == grown.num_parameters()


def test_loaded_model_goes_on_growing_as_if_nothing_had_happened(
    folder: Path, grown: MorphableModel, new_host: NewHost, tokens: Tensor
) -> None:
    """Training, schedules, embargo and further lifecycle moves: equal bits step by step."""
    grown.set_schedule("block.2", 0, lifecycle_pb2.AlphaSchedule(steps=4))
    esper.save(grown, folder)
    model = esper.load(folder, new_host(seed=8))
    optimizers = []
    for one in (grown, model):
        one.train()
        one.advance("block.2", 0, "GRAFTING")
        optimizers.append(torch.optim.Adam(one.parameters(), lr=0.01))
    completed: list[list[tuple[str, int]]] = [[], []]
    for _ in range(6):
        outputs = []
        for i, (one, optimizer) in enumerate(zip((grown, model), optimizers, strict=True)):
            optimizer.zero_grad()
            out = one(tokens)
            out.square().mean().backward()
            optimizer.step()
            completed[i] += one.tick()
            outputs.append(out)
        assert torch.equal(outputs[0], outputs[1])
    assert completed[0] == completed[1]
    assert ("block.2", 0) in completed[0]
    assert model.bank.to_bytes() == grown.bank.to_bytes()
    for one in (grown, model):
        one.germinate("block.2", 1, "affine")  # its embargo is over
    assert model.bank.to_bytes() == grown.bank.to_bytes()


def test_fresh_process_computes_the_same_bits(
    folder: Path, grown: MorphableModel, tokens: Tensor, tmp_path: Path
) -> None:
    conftest = Path(__file__).with_name("conftest.py")
    program = f"""
import hashlib, runpy, torch, esper
Net = runpy.run_path({str(conftest)!r})["Net"]
tokens = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(5))
model = esper.load({str(folder)!r}, Net()).eval()
print(hashlib.sha256(model(tokens).detach().numpy().tobytes()).hexdigest())
"""
    expected = hashlib.sha256(grown.eval()(tokens).detach().numpy().tobytes()).hexdigest()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == expected


def test_folder_says_what_the_model_is(tmp_path: Path, grown: MorphableModel) -> None:
    event = LifecycleEvent(
        epoch=1,
        step=17,
        slot="block",
        seed=0,
        before="EVALUATING",
        after="FOSSILIZED",
        kernel="ab" * 32,
        reason='it "helps"\nmuch',
    )
    path = tmp_path / "deep" / "model"
    esper.save(grown, path, task="digits", history=[event, event])
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1, "the umask says who may read"
    lines = (path / "growth_history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [event.to_json()] * 2
    document = json.loads((path / "architecture.json").read_text())
    assert document["task"] == "digits"
    assert document["host"]["aliases"] == {"head.weight": "embed.weight"}
    assert document["host"]["tensors"]["block.0.weight"] == {"shape": [12, 12], "dtype": "float32"}
    assert document["slots"]["head"]["chunk_widths"] == [4, 4, 3]
    planted = document["slots"]["block"]["seeds"][0]
    assert planted["state"] == "FOSSILIZED"
    assert document["kernels"][planted["kernel"]]["bottleneck"]["rank"] == "4"
    norm = document["slots"]["norm"]["seeds"][1]["kernel"]
    assert document["kernels"][norm]["graph"]["graph"]["nodes"], "lowering in full"
    card = (path / "README.md").read_text()
    assert "| `block` | 0 | bottleneck | FOSSILIZED | 1 |" in card
    assert "esper.load" in card
    architecture = read_architecture(path)
    assert (architecture.task, architecture.esper_version) == ("digits", esper.__version__)


def test_saving_changes_nothing_and_is_repeatable(
    tmp_path: Path, grown: MorphableModel, tokens: Tensor
) -> None:
    expected = grown(tokens)
    state = torch.get_rng_state()
    esper.save(grown, tmp_path / "a")
    esper.save(grown, tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(grown(tokens), expected)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_model_without_any_forward_is_restored(tmp_path: Path, new_host: NewHost) -> None:
    esper.save(esper.wrap(new_host(), target_layers=["block"]), tmp_path / "model")
    model = esper.load(tmp_path / "model", new_host(seed=3))
    assert model.slots["block"].width is None
    assert torch.equal(model.host.norm.weight, new_host().norm.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_element_types_come_back_exactly(
    tmp_path: Path,
    new_host: NewHost,
    tokens: Tensor,
    plant: Callable[..., None],
    dtype: torch.dtype,
) -> None:
    model = esper.wrap(new_host().to(dtype), target_layers=["block"])
    model(tokens)
    plant(model, "block", 1, "bottleneck", rank=2)
    esper.save(model, tmp_path / "model")
    with pytest.raises(ModelFolderError, match=f"float32.*made for.*{str(dtype)[6:]}"):
        esper.load(tmp_path / "model", new_host())
    again = esper.load(tmp_path / "model", new_host().to(dtype))
    assert torch.equal(again(tokens), model(tokens))
    assert again.seed_parameters("block", 1)[0].dtype == dtype


def test_block_without_parameters_and_conv_channels_come_back(
    tmp_path: Path, plant: Callable[..., None]
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.Sequential(nn.ReLU()), nn.Conv2d(6, 4, 3)
        )

    images = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    model = esper.wrap(make(), target_layers=["0", "1", "2"], seeds_per_layer=2)
    model(images)
    plant(model, "0", 1, "bottleneck", rank=2, source="input")
    plant(model, "1", 0, "affine")
    plant(model, "2", 0, "depthwise")
    esper.save(model, tmp_path / "model")
    again = esper.load(tmp_path / "model", make())
    assert again.slots["0"].channel_axis == model.slots["0"].channel_axis
    assert torch.equal(again(images), model(images))


# ---------------------------------------------------------------- refusals


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "must be a model folder"),
    "no architecture": (
        lambda f: (f / "architecture.json").unlink(),
        "it has no architecture.json",
    ),
    "no weights": (
        lambda f: (f / "weights.safetensors").unlink(),
        "weights.safetensors is 'missing'",
    ),
    "no history": (
        lambda f: (f / "growth_history.jsonl").unlink(),
        "growth_history.jsonl is 'missing'",
    ),
    "truncated weights": (
        lambda f: os.truncate(f / "weights.safetensors", 1000),
        "size of weights.safetensors is 1000, but .* truncated",
    ),
    "altered weights": (
        lambda f: (f / "weights.safetensors").write_bytes(
            (f / "weights.safetensors").read_bytes()[:-1] + b"\x01"
        ),
        "sha256 of weights.safetensors is .* corrupt",
    ),
    "truncated architecture": (
        lambda f: os.truncate(f / "architecture.json", 500),
        "architecture.json is 'unreadable', but .* truncated",
    ),
    "empty architecture": (
        lambda f: os.truncate(f / "architecture.json", 0),
        "truncated or corrupt",
    ),
    "binary architecture": (
        lambda f: (f / "architecture.json").write_bytes(b"\x80\x04\x95" + bytes(100)),
        "must be JSON",
    ),
    "deep architecture": (
        lambda f: (f / "architecture.json").write_text("[" * 100_000),
        "must be JSON",
    ),
    "list for object": (lambda f: (f / "architecture.json").write_text("[]"), "must be an object"),
    "NaN": (
        lambda f: (f / "architecture.json").write_text('{"format": NaN}'),
        "'NaN', but JSON has no such number",
    ),
    "repeated key": (
        lambda f: (f / "architecture.json").write_text('{"format": "a", "format": "b"}'),
        "'format', but a key may stand only once",
    ),
    "other format": (
        lambda f: (f / "architecture.json").write_text('{"format": "onnx"}'),
        "format is 'onnx', but it must be 'esper-model'",
    ),
    "edited by hand": (
        lambda f: (f / "architecture.json").write_text(
            (f / "architecture.json").read_text().replace("FOSSILIZED", "FINE_TUNING", 1)
        ),
        "corrupt or was edited",
    ),
    "newer format": (
        lambda f: resign(f, lambda d: d.update(format_version=2)),
        "format_version is 2, but this Esper reads version 1",
    ),
    "unknown field": (
        lambda f: resign(f, lambda d: d.update(magic=1)),
        "architecture.json.magic is 'given', but this format has no such field",
    ),
    "missing field": (
        lambda f: resign(f, lambda d: d.pop("slots")),
        "architecture.json.slots is 'missing', but it is required",
    ),
    "wrong type": (
        lambda f: resign(f, lambda d: d["host"]["tensors"]["norm.bias"].update(shape=[12.5])),
        r"norm.bias'\].shape\[0\] is 12.5, but it must be a whole number",
    ),
    "kernel of another digest": (
        lambda f: resign(
            f, lambda d: next(iter(d["kernels"].values())).update(blueprint_digest="00" * 32)
        ),
        "a kernel must stand under its own digest",
    ),
    "kernel that is none": (
        lambda f: resign(f, lambda d: next(iter(d["kernels"].values())).update(os="linux")),
        "must be a Kernel message",
    ),
    "seed with an unknown kernel": (
        lambda f: resign(f, lambda d: d["slots"]["block"]["seeds"][0].update(kernel="ff" * 32)),
        "kernels has no such digest",
    ),
    "seed with an unknown state": (
        lambda f: resign(f, lambda d: d["slots"]["block"]["seeds"][0].update(state="ASLEEP")),
        "state is 'ASLEEP', but it must be one of DORMANT",
    ),
    "seed at odds with the bank": (
        lambda f: resign(f, lambda d: d["slots"]["head"]["seeds"][0].update(alpha=0.5)),
        "alpha is 0.5, but the bank says 0.25",
    ),
    "bank that is no base64": (
        lambda f: resign(f, lambda d: d["lifecycle"].update(bank="!!")),
        "must be base64",
    ),
    "bank of another digest": (
        lambda f: resign(f, lambda d: d["lifecycle"].update(bank="AAAA")),
        "the bank's digest is",
    ),
    "bank that is none": (
        lambda f: resign(
            f,
            lambda d: d["lifecycle"].update(
                bank="AAAA", sha256=hashlib.sha256(bytes(3)).hexdigest()
            ),
        ),
        "inconsistent.* shorter than a header",
    ),
    "slots in another order": (
        lambda f: resign(f, lambda d: d.update(slots=dict(reversed(d["slots"].items())))),
        "its slots must be",
    ),
    "slot that the host lacks": (
        lambda f: resign(
            f,
            lambda d: d["slots"].update(
                ghost={
                    **d["slots"]["norm"],
                    "seeds": [dict(state="DORMANT", alpha=0, kernel="")] * 3,
                }
            ),
        ),
        "inconsistent.*target_layers has 'ghost'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_refused_and_the_host_is_left_alone(
    folder: Path, new_host: NewHost, damage: str
) -> None:
    harm, message = DAMAGES[damage]
    harm(folder)
    host = new_host(seed=8)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with pytest.raises(ModelFolderError, match=message):
        esper.load(folder, host)
    assert untouched(host, before)
    esper.wrap(host)  # nothing of a half-done load is left on it


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(file=st.sampled_from(FILES[1:]), at=st.floats(0, 1), flip=st.integers(1, 255))
def test_any_flipped_byte_is_found_or_harmless(
    folder: Path,
    grown: MorphableModel,
    new_host: NewHost,
    tokens: Tensor,
    file: str,
    at: float,
    flip: int,
) -> None:
    path = folder / file
    original = path.read_bytes()
    if not original:
        return
    position = int(at * (len(original) - 1))
    damaged = bytearray(original)
    damaged[position] ^= flip
    path.write_bytes(bytes(damaged))
    host = new_host(seed=8)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    try:
        model = esper.load(folder, host)
    except ModelFolderError:
        assert untouched(host, before)
    else:
        assert file == "architecture.json"
        assert chr(original[position]).isspace(), "only white space may differ"
        assert torch.equal(model.eval()(tokens), grown.eval()(tokens))
    finally:
        path.write_bytes(original)


WRONG_HOSTS: dict[str, tuple[dict[str, int | bool], str]] = {
    "wider": ({"width": 16}, r"host.embed.weight is 'float32\[11, 16\]', but .*float32\[11, 12\]"),
    "with more": ({"extra": True}, "host.extra.weight is 'given', but .* does not have it"),
    "untied": ({"tied": False}, "host.head.weight is 'not tied', but .* ties it to embed.weight"),
}


@pytest.mark.parametrize("kind", WRONG_HOSTS)
def test_wrong_host_is_refused(folder: Path, new_host: NewHost, kind: str) -> None:
    arguments, message = WRONG_HOSTS[kind]
    host = new_host(**arguments)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with pytest.raises(ModelFolderError, match=message):
        esper.load(folder, host)
    assert untouched(host, before)


def test_host_that_lacks_a_layer_or_ties_more_is_refused(
    tmp_path: Path, new_host: NewHost, folder: Path
) -> None:
    with pytest.raises(ModelFolderError, match="host.* is 'missing', but .*Net that has it"):
        esper.load(folder, nn.Linear(2, 2))
    esper.save(esper.wrap(new_host(tied=False)), tmp_path / "untied")
    with pytest.raises(ModelFolderError, match="tied to embed.weight.* does not tie it"):
        esper.load(tmp_path / "untied", new_host())


def test_wrapped_host_and_plain_model_are_refused(
    folder: Path, tmp_path: Path, new_host: NewHost
) -> None:
    with pytest.raises(ValueError, match="host is wrapped already"):
        esper.load(folder, esper.wrap(new_host()))
    with pytest.raises(ValueError, match="model is a Net, but only a wrapped model can be saved"):
        esper.save(new_host(), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


# ---------------------------------------------------------------- writing


def test_model_folder_is_replaced_as_a_whole(
    folder: Path, grown: MorphableModel, new_host: NewHost
) -> None:
    (folder / "stale").write_text("from before")
    grown.cull("head", 0)
    esper.save(grown, folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    assert esper.load(folder, new_host()).seed_state("head", 0).name == "CULLED"
    assert list(folder.parent.iterdir()) == [folder], "nothing temporary is left"


def test_failed_save_leaves_the_old_folder(
    folder: Path, grown: MorphableModel, new_host: NewHost, tokens: Tensor
) -> None:
    expected = grown.eval()(tokens)
    grown.host.register_module("odd", ExtraState())
    with pytest.raises(ModelFolderError, match="host.odd._extra_state is 'dict', but only tensors"):
        esper.save(grown, folder)
    assert torch.equal(esper.load(folder, new_host()).eval()(tokens), expected)
    assert list(folder.parent.iterdir()) == [folder]


class ExtraState(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: object) -> None: ...


def test_other_things_are_never_overwritten(tmp_path: Path, grown: MorphableModel) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    for name in ("thesis", "file"):
        with pytest.raises(ModelFolderError, match="no model folder; choose another"):
            esper.save(grown, tmp_path / name)
    with pytest.raises(ModelFolderError, match="cannot be written"):
        esper.save(grown, tmp_path / "file" / "below")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    esper.save(grown, tmp_path / "empty")
    assert (tmp_path / "empty" / "README.md").exists()


def test_folder_holds_no_pickle(folder: Path) -> None:
    for file in folder.iterdir():
        data = file.read_bytes()
        assert not data.startswith((b"\x80", b"PK"))
        if file.suffix != ".safetensors":
            data.decode("utf-8")
