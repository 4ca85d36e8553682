"""A folder that is damaged, or made for another host, is refused with the host left alone."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save_file
from torch import Tensor
from torch import nn

import esper
from esper.artifacts import ModelFolderError
from esper.kasmina import MorphableModel

NewHost = Callable[..., nn.Module]
FILES = ("architecture.json", "growth_history.jsonl", "weights.safetensors")


def resign(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Edits architecture.json and makes its digest right again, as an attacker could."""
    path = folder / "architecture.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    change(document)
    text = json.dumps(document, separators=(",", ":"))
    document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(document))


def swap(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites the weights and makes their digest right again."""
    path = folder / "weights.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    seal(folder)


def seal(folder: Path) -> None:
    data = (folder / "weights.safetensors").read_bytes()
    digest = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    resign(folder, lambda d: d["files"].update(weights=digest))


def untouched(host: nn.Module, before: dict[str, Tensor]) -> bool:
    hooks = any(module._forward_hooks for module in host.modules())
    same = all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    return same and not hooks


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
    "seed in a state at odds with the bank": (
        lambda f: resign(f, lambda d: d["slots"]["block"]["seeds"][0].update(state="FINE_TUNING")),
        "state is 'FINE_TUNING', but the bank says FOSSILIZED",
    ),
    "seed without its kernel": (
        lambda f: (
            resign(f, lambda d: d["slots"]["norm"]["seeds"][0].update(kernel="")),
            swap(f, lambda w: [w.pop(name) for name in list(w) if name.startswith("slots.norm.0")]),
        ),
        "inconsistent.*GERMINATED in the bank",
    ),
    "unknown slot kind": (
        lambda f: resign(f, lambda d: d["slots"]["norm"].update(kind="RECURRENT")),
        "kind is 'RECURRENT', but it must be one of LINEAR",
    ),
    "slot without seeds": (
        lambda f: resign(f, lambda d: d["slots"]["norm"].update(seeds=[])),
        "a slot has at least 1 seed",
    ),
    "slot with fewer seeds": (
        lambda f: resign(
            f,
            lambda d: (
                d["slots"]["norm"]["seeds"].pop(),
                d["slots"]["norm"].update(width=None, chunk_widths=[]),
            ),
        ),
        "weights.safetensors|bank has 5 slots with 15 seeds, but the model has 5 with 14",
    ),
    "chunks that do not add up": (
        lambda f: resign(f, lambda d: d["slots"]["norm"].update(chunk_widths=[4, 4, 5])),
        "chunk_widths is .* width and seeds give",
    ),
    "path that is none": (
        lambda f: resign(f, lambda d: d["slots"]["norm"].update(output_path=[["tuple", True]])),
        "output_path is .* list of .container, key.",
    ),
    "alpha that is no number": (
        lambda f: resign(f, lambda d: d["slots"]["norm"]["seeds"][0].update(alpha=True)),
        "alpha is True, but it must be a number",
    ),
    "alias of nothing": (
        lambda f: resign(f, lambda d: d["host"].update(aliases={"head.weight": "nowhere"})),
        "an alias must name a tensor",
    ),
    "tensor missing from the weights": (
        lambda f: swap(f, lambda w: w.pop("slots.block.0.A")),
        r"slots.block.0.A'\] is 'missing', but architecture.json requires it",
    ),
    "tensor too many in the weights": (
        lambda f: swap(f, lambda w: w.update(evil=torch.zeros(1))),
        r"evil'\] is 'given', but architecture.json knows no such tensor",
    ),
    "tensor of another shape": (
        lambda f: swap(f, lambda w: w.update({"host.norm.bias": torch.zeros(3)})),
        r"shape of .*norm.bias.* is \(3,\), but architecture.json says \(12,\)",
    ),
    "tensor of another type": (
        lambda f: swap(f, lambda w: w.update({"host.norm.bias": torch.zeros(12).half()})),
        "dtype of .*norm.bias.* is 'float16', but architecture.json says float32",
    ),
    "seed tensor of another type": (
        lambda f: swap(f, lambda w: w.update({"slots.block.0.b": torch.zeros(4).double()})),
        "dtype of slots.block.0.b is 'float64', but the host computes in float32",
    ),
    "weights that are no safetensors": (
        lambda f: ((f / "weights.safetensors").write_bytes(b"\x80\x04pickle"), seal(f)),
        "weights.safetensors is 'unreadable', but it must be a safetensors file",
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
@given(file=st.sampled_from(FILES), at=st.floats(0, 1), flip=st.integers(1, 255))
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
    with pytest.raises(ValueError, match="wrapped already"):
        esper.load(folder, esper.wrap(new_host()))
    with pytest.raises(ValueError, match="model is a Net, but only a wrapped model can be saved"):
        esper.save(new_host(), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_lazy_host_is_refused_before_it_has_a_shape(folder: Path) -> None:
    with pytest.raises(ModelFolderError, match="host.weight is 'uninitialized'"):
        esper.load(folder, nn.LazyLinear(3))
