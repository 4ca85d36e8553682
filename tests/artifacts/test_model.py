"""A saved model comes back as it was, bit for bit, or not at all."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
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


def seeds(model: MorphableModel) -> list[tuple[str, int]]:
    return [(slot, seed) for slot, layer in model.slots.items() for seed in range(layer.num_seeds)]


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


def test_broken_seed_can_be_saved_and_loaded(
    tmp_path: Path, grown: MorphableModel, new_host: NewHost, tokens: Tensor
) -> None:
    with torch.no_grad():
        grown.seed_parameters("block", 0)[0].fill_(torch.inf)
    esper.save(grown, tmp_path / "model")
    loaded = esper.load(tmp_path / "model", new_host(seed=8))
    assert loaded.seed_parameters("block", 0)[0].isinf().all()
    assert torch.equal(loaded.eval()(tokens), grown.eval()(tokens))


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
