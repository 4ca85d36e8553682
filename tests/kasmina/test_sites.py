import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from esper.common.v1 import kernel_pb2
from esper.kasmina import wrap
from esper.kasmina.sites import block_channel_axis
from esper.kasmina.sites import chunk_bounds
from esper.kasmina.sites import find_sites
from esper.kasmina.sites import host_flops_per_token


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 10)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def names_of(host, targets=None):
    return [site.name for site in find_sites(host, targets)]


def test_default_takes_every_module_of_the_default_types_in_order():
    assert names_of(Net()) == [
        "embed",
        "blocks.0.norm",
        "blocks.0.mlp.0",
        "blocks.0.mlp.2",
        "blocks.1.norm",
        "blocks.1.mlp.0",
        "blocks.1.mlp.2",
        "head",
    ]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("blocks.*.mlp", ["blocks.0.mlp", "blocks.1.mlp"]),
        (["head", "embed"], ["embed", "head"]),
        (nn.LayerNorm, ["blocks.0.norm", "blocks.1.norm"]),
        ([nn.Embedding, "blocks.[1].mlp", "head"], ["embed", "blocks.1.mlp", "head"]),
        (["head", "head", "h*d"], ["head"]),
    ],
)
def test_targets_are_types_names_and_globs_in_any_mix(targets, expected):
    assert names_of(Net(), targets) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("blocks.*.mpl", r"target_layers has 'blocks.\*.mpl'.*near names: .*blocks.0.mlp"),
        (["head", "haed"], r"target_layers has 'haed'.*near names: head"),
        (nn.Conv2d, "target_layers has Conv2d, but no module"),
        ([], "target_layers is empty"),
        ([3], "target_layers has 3, but it must hold module types, names or globs"),
        ([int], "target_layers has <class 'int'>"),
        ("blocks", "'blocks', but a ModuleList there is never called"),
    ],
)
def test_a_target_without_a_match_is_named(targets, message):
    with pytest.raises(ValueError, match=message):
        find_sites(Net(), targets)


def test_a_model_without_a_suitable_module_is_refused():
    with pytest.raises(ValueError, match="Sequential has no module below its root"):
        find_sites(nn.Sequential(nn.ReLU()), None)


def test_projections_of_attention_are_not_offered():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert names_of(layer) == ["self_attn", "linear1", "linear2", "norm1", "norm2"]
    assert names_of(layer, "*") == [
        "self_attn",
        "linear1",
        "dropout",
        "linear2",
        "norm1",
        "norm2",
        "dropout1",
        "dropout2",
    ]
    with pytest.raises(ValueError, match="'self_attn.out_proj'.*never called as a module"):
        find_sites(layer, "self_attn.out_proj")


def test_modules_inside_a_parametrization_are_not_offered():
    host = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert names_of(host) == ["0", "1"]
    assert all("parametrizations" not in name for name in names_of(host, "*"))


def test_a_shared_module_is_one_site_under_any_of_its_names():
    host = nn.Module()
    host.a = nn.Linear(4, 4)
    host.b = host.a
    assert names_of(host) == ["a"]
    assert names_of(host, "b") == ["a"]


def test_lazy_modules_must_be_initialized_first():
    host = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="'0'.*not initialized"):
        find_sites(host, None)
    host(torch.zeros(2, 3))
    assert names_of(host) == ["0"]


@pytest.mark.parametrize(
    ("module", "kind", "axis", "width", "source"),
    [
        (nn.Linear(3, 5), "LINEAR", None, 5, 3),
        (nn.Conv1d(3, 5, 3, padding=1), "CONV", -2, 5, 3),
        (nn.Conv2d(3, 5, 3, padding="same"), "CONV", -3, 5, 3),
        (nn.Conv2d(3, 5, 1, padding="valid"), "CONV", -3, 5, 3),
        (nn.Conv2d(3, 5, 3, padding=2, dilation=2), "CONV", -3, 5, 3),
        (nn.Conv2d(3, 5, 3), "CONV", -3, 5, None),
        (nn.Conv2d(3, 5, 3, padding=1, stride=2), "CONV", -3, 5, None),
        (nn.ConvTranspose2d(3, 5, 3, padding=1), "CONV", -3, 5, None),
        (nn.MultiheadAttention(8, 2), "ATTENTION", None, 8, 8),
        (nn.LayerNorm((4, 6)), "NORM", None, 6, 6),
        (nn.BatchNorm2d(7), "CHANNEL_NORM", 1, 7, 7),
        (nn.GroupNorm(2, 8), "CHANNEL_NORM", 1, 8, 8),
        (nn.Embedding(9, 4), "EMBEDDING", None, 4, None),
        (nn.ReLU(), "BLOCK", None, None, None),
    ],
)
def test_what_a_module_tells_of_itself(module, kind, axis, width, source):
    (site,) = find_sites(nn.Sequential(module), "0")
    assert kernel_pb2.SlotKind.Name(site.kind) == f"SLOT_KIND_{kind}"
    assert (site.channel_axis, site.width, site.source_width) == (axis, width, source)


def test_every_module_that_tells_its_width_is_right():
    """What is read off the module is what a forward returns."""
    cases = [
        (nn.Conv2d(3, 5, 3, padding=2, dilation=2), torch.randn(2, 3, 6, 6)),
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), torch.randn(2, 4, 7)),
        (nn.BatchNorm1d(5), torch.randn(4, 5)),
        (nn.LayerNorm((4, 6)), torch.randn(2, 4, 6)),
    ]
    for module, x in cases:
        (site,) = find_sites(nn.Sequential(module), "0")
        y = module(x)
        axis = -1 if site.channel_axis is None else site.channel_axis
        assert y.shape[axis] == site.width
        assert x.shape[axis] == site.source_width
        assert y.movedim(axis, -1).shape[:-1] == x.movedim(axis, -1).shape[:-1]


@given(width=st.integers(1, 300), num_seeds=st.integers(1, 300))
def test_chunks_cover_all_features_and_are_balanced(width, num_seeds):
    if num_seeds > width:
        return
    bounds = chunk_bounds(width, num_seeds)
    assert len(bounds) == num_seeds
    assert bounds[0][0] == 0 and bounds[-1][1] == width
    assert all(left[1] == right[0] for left, right in zip(bounds, bounds[1:], strict=False))
    widths = [end - begin for begin, end in bounds]
    assert max(widths) - min(widths) <= 1 and min(widths) >= 1


def test_feature_axis_of_a_block_follows_its_convolutions():
    conv = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    assert block_channel_axis(conv, 4) == -3
    assert block_channel_axis(conv, 2) is None  # pooled and flattened
    patches = nn.Sequential(nn.Conv1d(3, 5, 3), nn.LayerNorm(5))
    assert block_channel_axis(patches, 3) is None
    assert block_channel_axis(nn.Linear(3, 5), 3) is None


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(3, 5), torch.zeros(1, 3)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.zeros(1, 4, 3, 3)),
        (nn.Conv1d(4, 6, 3), torch.zeros(1, 4, 3)),
        (nn.LayerNorm(5), torch.zeros(1, 5)),
    ],
)
def test_host_cost_is_what_the_flop_counter_counts(module, x):
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        module(x)
    assert host_flops_per_token(module) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"seeds_per_layer": 0},
            "seeds_per_layer is 0, but it must be a whole number from 1 to 65536",
        ),
        (
            {"target_layers": ["0"], "seeds_per_layer": 9},
            "seeds_per_layer is 9, but slot '0' has 8 features",
        ),
        ({"cache_size_mb": -1}, "cache_size_mb is -1"),
        ({"target_layers": "nope"}, "target_layers has 'nope'"),
    ],
)
def test_wrap_refuses_bad_arguments_and_leaves_the_model_alone(arguments, message):
    host = nn.Sequential(nn.Linear(4, 8))
    with pytest.raises(ValueError, match=message):
        wrap(host, **arguments)
    assert wrap(host).get_layer_names() == ["0"]


@pytest.mark.parametrize("targets", [None, "auto"])
def test_a_narrow_layer_that_nobody_named_gets_as_many_seeds_as_features(targets):
    model = wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), targets)
    last = model.slots[model.get_layer_names()[-1]]
    assert (last.width, last.num_seeds) == (2, 2)
    model.germinate(last.name, 1, "lora", rank=1)
    assert model(torch.ones(3, 4)).shape == (3, 2)


def test_wrap_refuses_what_is_no_module():
    with pytest.raises(ValueError, match="model is a builtin_function"):
        wrap(torch.relu)
