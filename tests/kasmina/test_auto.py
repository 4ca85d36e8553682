"""Where ``target_layers="auto"`` finds that a model can grow: ten families of models, and traps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.kasmina.auto import find_places


class BasicBlock(nn.Module):
    def __init__(self, inner, outer, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.short = nn.Conv2d(inner, outer, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += self.short(x)
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.stages = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, stride=2))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def vgg():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 2)),
    )


class DecoderBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        q, k, v = self.qkv(self.ln1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + F.dropout(self.proj(F.gelu(self.fc(self.ln2(x)))), 0.1, self.training)


class Decoder(nn.Module):
    """Looks at its input's length, which tracing cannot follow."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([DecoderBlock(), DecoderBlock()])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, targets=None):
        if ids.shape[1] > 16:
            raise ValueError("too long")
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = self.double(3, 8)
        self.middle = self.double(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge = self.double(16, 8)
        self.head = nn.Conv2d(8, 1, 1)

    def double(self, inner, outer):
        def conv(a):
            return nn.Conv2d(a, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()

        return nn.Sequential(*conv(inner), *conv(outer))

    def forward(self, x):
        skip = self.down(x)
        x = self.up(self.middle(F.max_pool2d(skip, 2)))
        return self.head(self.merge(torch.cat([x, skip], dim=1)))


class MixerBlock(nn.Module):
    def __init__(self, tokens=4, width=8):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 16), nn.GELU(), nn.Linear(16, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.right = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, user, item):
        return (self.left(user) * self.right(item)).sum(-1)


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(x).mean(1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


IMAGE = torch.randn(2, 3, 8, 8)
IDS = torch.zeros(2, 5, dtype=torch.long)
FAMILIES = {
    "MLP": (
        lambda: nn.Sequential(
            *(nn.Flatten(), nn.Linear(192, 16), nn.ReLU()),
            *(nn.Dropout(0.1), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)),
        ),
        (IMAGE,),
        ["1 -> 4", "4 -> 6"],
    ),
    "ResNet": (
        ResNet,
        (IMAGE,),
        [
            "stages.0",
            "stem.0 -> stages.0.conv1",
            "stages.0.conv1 -> stages.0.conv2",
            "stages.1",
            "stages.1.conv1",
        ],
    ),
    "VGG": (vgg, (IMAGE,), ["0", "3 -> 5", "9 -> 12"]),
    "transformer encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
        (torch.randn(5, 2, 8),),
        [
            "layers.0",
            "layers.0.linear1 -> layers.0.linear2",
            "layers.1",
            "layers.1.linear1 -> layers.1.linear2",
        ],
    ),
    "decoder": (
        Decoder,
        (IDS,),
        ["blocks.0", "blocks.0.fc -> blocks.0.proj", "blocks.1", "blocks.1.fc -> blocks.1.proj"],
    ),
    "LSTM": (Recurrent, (IDS,), ["lstm"]),
    "U-Net": (
        UNet,
        (IMAGE,),
        ["down.0 -> down.3", "middle.0 -> middle.3", "merge.0 -> merge.3", "merge.3 -> head"],
    ),
    "mixer": (
        lambda: nn.Sequential(nn.Linear(6, 8), MixerBlock(), nn.Linear(8, 3)),
        (torch.randn(2, 4, 6),),
        ["1", "1.tokens.0 -> 1.tokens.2", "1.channels.0 -> 1.channels.2"],
    ),
    "two towers": (
        TwoTowers,
        (torch.randn(2, 6), torch.randn(2, 4)),
        ["left.0 -> left.2", "right.0 -> right.2"],
    ),
    "vision transformer": (
        VisionTransformer,
        (IMAGE,),
        [
            "encoder.layers.0",
            "encoder.layers.0.linear1 -> encoder.layers.0.linear2",
            "encoder.layers.1",
            "encoder.layers.1.linear1 -> encoder.layers.1.linear2",
        ],
    ),
    "gated MLP": (
        lambda: nn.Sequential(Gated(), nn.Linear(8, 2)),
        (torch.randn(3, 8),),
        ["0", "0.gate -> 0.down"],
    ),
}


def _found(model):
    return [
        name if layer.inlet.name is None else f"{layer.inlet.name} -> {name}"
        for name, layer in model.slots.items()
    ]


@pytest.mark.parametrize("by", ["tracing", "running"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_and_that_every_bridge_can_grow(family, by):
    torch.manual_seed(0)
    make, inputs, expected = FAMILIES[family]
    model = esper.wrap(make(), "auto", 2, example_inputs=inputs if by == "running" else None)
    assert _found(model) == expected
    model.eval()
    before = model(*inputs)
    bridges = [slot for slot in model.slots.values() if slot.inlet.name is not None]
    for slot in bridges:
        assert slot.source_width is not None
        model.germinate(slot.name, 0, "widen", rank=2)
        for state in ("TRAINING", "GRAFTING", "STABILIZATION"):
            model.advance(slot.name, 0, state)
        for parameter in model.seed_parameters(slot.name, 0):
            nn.init.constant_(parameter, 1 if parameter.dim() > 1 else 20)  # no ReLU is dead
        assert not torch.equal(model(*inputs), before), "the seed acts"
        model.cull(slot.name, 0)
    assert torch.equal(model(*inputs), before)
    assert bridges or family == "LSTM"


def test_a_slot_has_no_more_seeds_than_features_and_saves_so(tmp_path):
    def make():
        return nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)
        )

    model = esper.wrap(make(), "auto", seeds_per_layer=4)
    assert {name: slot.num_seeds for name, slot in model.slots.items()} == {"2": 4, "4": 1}
    x = torch.randn(3, 6)
    model(x)
    model.germinate("4", 0, "widen", rank=2)
    esper.save(model, tmp_path / "model")
    loaded = esper.load(tmp_path / "model", make())
    assert {name: slot.num_seeds for name, slot in loaded.slots.items()} == {"2": 4, "4": 1}
    assert loaded.occupied_seeds() == [("4", 0)]


class Shared(nn.Module):
    """One pair used twice in turns, and one that is not: its second input would be lost."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(2):
            x = self.b(torch.relu(self.a(x)))
        one, two = torch.relu(self.c(x)), torch.relu(self.c(-x))
        return self.d(one) + self.d(two)


@pytest.mark.parametrize("inputs", [None, ((torch.randn(2, 8),), {})])
def test_shared_modules_are_bridged_where_they_run_in_turns(inputs):
    places = find_places(Shared(), inputs)
    assert [place for place in places if not isinstance(place, str)] == [
        esper.kasmina.Bridge("a", "b")
    ]


class Stateful(nn.Module):
    """What a forward must not leave behind in the user's model."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last = x
        return self.body(x) + torch.rand(())


@pytest.mark.parametrize("inputs", [None, ((torch.randn(3, 4),), {})])
def test_finding_places_leaves_the_model_and_all_random_states_alone(inputs):
    host = Stateful()
    before, random = copy.deepcopy(host.state_dict()), torch.get_rng_state()
    assert [place.last for place in find_places(host, inputs)] == ["body.3"]
    assert all(torch.equal(host.state_dict()[name], value) for name, value in before.items())
    assert host.last is None and torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


def test_example_inputs_show_what_tracing_cannot_follow_and_tell_the_widths():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x, *, scale):
            hidden = torch.relu(self.first(x))
            return self.last(hidden * 2 if float(scale) > 1 else hidden)

    with pytest.raises(ValueError, match="no place to grow was found in Choosing.*example_inputs"):
        esper.wrap(Choosing(), "auto")
    inputs = {"x": torch.randn(2, 4), "scale": torch.ones(())}
    assert _found(esper.wrap(Choosing(), "auto", example_inputs=inputs)) == ["first -> last"]
    block = esper.wrap(
        nn.Sequential(nn.Sequential(nn.Linear(4, 6))), "0", example_inputs=torch.ones(1, 4)
    )
    assert (block.slots["0"].width, block.slots["0"].source_width) == (6, 4)


def test_attention_projections_are_not_offered():
    host = nn.TransformerEncoderLayer(8, 2, 16)
    assert "self_attn.out_proj" not in str(find_places(host, None))
