"""Real torch modules of every make, for the tests of fidelity."""

import dataclasses
from collections import namedtuple

import torch
from torch import Tensor
from torch import nn

Pair = namedtuple("Pair", "state mask")


@dataclasses.dataclass
class Record:
    ids: Tensor
    hidden: Tensor
    note: str = "kept"


class Returns(nn.Module):
    """A block that packs its output; the model takes it apart again."""

    def __init__(self, pack):
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.pack = pack

    def forward(self, x):
        return self.pack(self.linear(x))


class Packed(nn.Module):
    def __init__(self, pack, unpack):
        super().__init__()
        self.block = Returns(pack)
        self.unpack = unpack
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        packed = self.block(x)
        assert type(packed) is type(self.block.pack(x.new_zeros(1, 8)))
        return self.head(self.unpack(packed))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.again = self.inner  # a second name for the same module

    def forward(self, x):
        return self.again(torch.relu(self.inner(x)))


class Residual(nn.Module):
    """Convolutions, BatchNorm and activations in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.bn(self.stem(x)))
        x = x + self.act(self.conv(x))
        return self.head(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    def __init__(self, **call):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.call = call

    def forward(self, x):
        y, weights = self.attention(x, x, x, **self.call)
        return y if weights is None else y + weights.mean() * x


class KeywordAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, *, query, memory):
        return self.attention(value=memory, key=memory, query=query, need_weights=False)[0]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Linear(6, 8)
        self.right = nn.Bilinear(8, 5, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, a, *, b, scale=1.0):
        return {"logits": self.head(self.right(self.left(a), b)) * scale, "ids": torch.arange(3)}


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        states, _ = self.lstm(x)
        return self.head(states[:, -1])


def frozen():
    host = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return host.requires_grad_(False)


def bool_mask(n):
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def float_mask(n):
    return torch.zeros(n, n).masked_fill(bool_mask(n), float("-inf"))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
SEQUENCE = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[1, 2, 3, 9], [4, 0, 1, 1]])

# name: (host, positional inputs, keyword inputs, target layers)
CASES = {
    "mlp": (mlp, (X,), {}, None),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(6, 8, bias=False)), (X,), {}, None),
    "three axes": (lambda: nn.Sequential(nn.Linear(8, 9)), (SEQUENCE,), {}, None),
    "one axis": (lambda: nn.Sequential(nn.Linear(6, 8)), (X[0],), {}, None),
    "batch of one": (mlp, (X[:1],), {}, None),
    "empty batch": (mlp, (X[:0],), {}, None),
    "non-contiguous": (mlp, (torch.cat([X, X], dim=1)[:, ::2],), {}, None),
    "bfloat16": (lambda: mlp().bfloat16(), (X.bfloat16(),), {}, None),
    "float16": (lambda: mlp().half(), (X.half(),), {}, None),
    "float64": (lambda: mlp().double(), (X.double(),), {}, None),
    "frozen": (frozen, (X,), {}, None),
    "frozen, input wants gradients": (frozen, (X.clone().requires_grad_(),), {}, None),
    "residual convolutions": (Residual, (IMAGES,), {}, None),
    "channels last": (
        lambda: Residual().to(memory_format=torch.channels_last),
        (IMAGES.to(memory_format=torch.channels_last),),
        {},
        None,
    ),
    "circular padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")),
        (IMAGES,),
        {},
        None,
    ),
    "reflect padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")),
        (IMAGES,),
        {},
        None,
    ),
    "grouped, dilated, strided": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=2, dilation=2, groups=3), nn.Conv2d(6, 8, 3, stride=2)
        ),
        (IMAGES,),
        {},
        None,
    ),
    "no images": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)),
        (IMAGES[:0],),
        {},
        None,
    ),
    "one image, strided": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)),
        (IMAGES[:1].transpose(2, 3),),
        {},
        None,
    ),
    "unbatched convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)),
        (IMAGES[0],),
        {},
        None,
    ),
    "convolution over time": (
        lambda: nn.Sequential(nn.Conv1d(7, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(True)),
        (SEQUENCE,),
        {},
        None,
    ),
    "convolution block": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(True))),
        (IMAGES,),
        {},
        "0",
    ),
    "attention": (Attention, (SEQUENCE,), {}, None),
    "attention, no weights": (lambda: Attention(need_weights=False), (SEQUENCE,), {}, None),
    "attention, weights of each head": (
        lambda: Attention(average_attn_weights=False),
        (SEQUENCE,),
        {},
        None,
    ),
    "attention, boolean mask": (
        lambda: Attention(attn_mask=bool_mask(7)),
        (SEQUENCE,),
        {},
        None,
    ),
    "attention, float mask": (lambda: Attention(attn_mask=float_mask(7)), (SEQUENCE,), {}, None),
    "attention, padding": (
        lambda: Attention(key_padding_mask=torch.arange(7).expand(3, 7) > 4),
        (SEQUENCE,),
        {},
        None,
    ),
    "attention by keyword": (
        KeywordAttention,
        (),
        {"query": SEQUENCE[:, :4], "memory": SEQUENCE},
        None,
    ),
    "attention, sequence first": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)),
        (SEQUENCE.transpose(0, 1),),
        {},
        None,
    ),
    "encoder layer with dropout": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True),
        (SEQUENCE,),
        {},
        None,
    ),
    "encoder, padded": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), num_layers=2
        ),
        (SEQUENCE,),
        {"src_key_padding_mask": torch.arange(7).expand(3, 7) > 4},
        None,
    ),
    "decoder": (Decoder, (SEQUENCE[:, :4], SEQUENCE), {}, None),
    "tied weights": (Tied, (IDS,), {}, None),
    "module used twice": (Twice, (SEQUENCE,), {}, None),
    "two inputs, one by keyword": (
        TwoInputs,
        (X,),
        {"b": SEQUENCE[0, :5, :5], "scale": 0.5},
        [nn.Linear, "right"],
    ),
    "LSTM": (Recurrent, (SEQUENCE[..., :6],), {}, [nn.LSTM, nn.Linear]),
    "tuple": (lambda: Packed(lambda h: (h, None), lambda p: p[0]), (X,), {}, ["block", "head"]),
    "ids first": (
        lambda: Packed(lambda h: [torch.arange(2), (h, h.detach())], lambda p: p[1][0]),
        (X,),
        {},
        "block",
    ),
    "dict": (lambda: Packed(lambda h: {"h": h}, lambda p: p["h"]), (X,), {}, "block"),
    "namedtuple": (lambda: Packed(lambda h: Pair(h, None), lambda p: p.state), (X,), {}, "block"),
    "dataclass": (
        lambda: Packed(lambda h: Record(torch.arange(2), h), lambda p: p.hidden),
        (X,),
        {},
        "block",
    ),
}
