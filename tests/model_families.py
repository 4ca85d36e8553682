"""Small models of the families that people train, with places and kernels to grow them by.

The kernels of a family read outputs and inputs, run natively and in the interpreter, and sit both
early and late, so that every test of a family has layers upstream and downstream of a seed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn

Inputs = tuple[tuple[Tensor, ...], dict[str, Tensor]]


def _draw(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + step)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12),
        nn.GELU(),
        nn.LayerNorm(12),
        nn.Linear(12, 9, bias=False),
        nn.Tanh(),
        nn.Linear(9, 5),
    )


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.bn1(self.conv1(x)))
        return self.act(x + self.bn2(self.conv2(inner)))


class ConvolutionalNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(ResidualBlock(8), ResidualBlock(8))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)).mean(dim=1))


class Decoder(nn.Module):
    """Of a translator: reads a memory, knows no later token, and is tied to its embedding.

    Where a decoder is not told that its mask is causal it looks at the mask's values, which torch
    cannot export: of the bare host no more than of a grown one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        return self.head(self.decoder(self.embed(ids), memory, tgt_mask=later, tgt_is_causal=True))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, sequence: Tensor) -> Tensor:
        states, _ = self.lstm(torch.tanh(self.project(sequence)))
        return self.head(states[:, -1])


class ManyInputs(nn.Module):
    """An image, figures and an optional weight of each sample, given by position and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.figures = nn.Linear(4, 8)
        self.join = nn.Linear(16, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, image: Tensor, figures: Tensor, *, weight: Tensor) -> dict[str, Tensor]:
        seen = self.image(image).mean(dim=(2, 3))
        joined = torch.cat([seen, torch.relu(self.figures(figures))], dim=1)
        hidden = torch.relu(self.join(joined))
        return {"logits": self.head(hidden) * weight, "hidden": hidden}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        make: Returns a new host.
        inputs: Positional and keyword inputs of a step, the batch on axis 0 of each.
        grafts: Slot, blueprint and hyperparameters of the seeds that are planted.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    grafts: tuple[tuple[str, str, dict[str, int]], ...]


FAMILIES = {
    "perceptron": Family(
        perceptron,
        lambda step: ((torch.randn(7, 6, generator=_draw(step)),), {}),
        (("3", "lora", {"rank": 2}), ("5", "widen", {"rank": 3}), ("2", "affine", {})),
    ),
    "residual convolutions": Family(
        ConvolutionalNet,
        lambda step: ((torch.randn(4, 3, 6, 6, generator=_draw(step)),), {}),
        (
            ("blocks.0.conv2", "widen", {"rank": 3}),
            ("blocks.1.conv1", "depthwise", {}),
            ("blocks.1.bn2", "squeeze_excite", {"rank": 2}),
            ("blocks.0", "bottleneck", {"rank": 2}),
            ("head", "norm_mlp", {"rank": 2}),
        ),
    ),
    "transformer encoder": Family(
        Encoder,
        lambda step: ((torch.randint(11, (3, 5), generator=_draw(step)),), {}),
        (
            ("embed", "bottleneck", {"rank": 2}),
            ("encoder.layers.0.linear1", "widen", {"rank": 2}),
            ("encoder.layers.1.self_attn", "glu", {"rank": 2}),
            ("encoder.layers.1", "norm_mlp", {"rank": 2}),
        ),
    ),
    "transformer decoder": Family(
        Decoder,
        lambda step: (
            (
                torch.randint(11, (3, 5), generator=_draw(step)),
                torch.randn(3, 4, 8, generator=_draw(step)),
            ),
            {},
        ),
        (
            ("decoder.layers.0.multihead_attn", "bottleneck", {"rank": 2}),
            ("decoder.layers.1.linear2", "widen", {"rank": 2}),
            ("head", "lora", {"rank": 2}),
        ),
    ),
    "recurrent": Family(
        Recurrent,
        lambda step: ((torch.randn(3, 5, 6, generator=_draw(step)),), {}),
        (
            ("project", "widen", {"rank": 2}),
            ("lstm", "bottleneck", {"rank": 2}),
            ("head", "norm_mlp", {"rank": 2}),
        ),
    ),
    "many inputs": Family(
        ManyInputs,
        lambda step: (
            (
                torch.randn(4, 3, 6, 6, generator=_draw(step)),
                torch.randn(4, 4, generator=_draw(step + 1000)),
            ),
            {"weight": torch.rand(4, 1, generator=_draw(step + 2000))},
        ),
        (
            ("image.0", "bottleneck", {"rank": 2}),
            ("image.2", "widen", {"rank": 2}),
            ("figures", "glu", {"rank": 2}),
            ("join", "norm_mlp", {"rank": 2}),
        ),
    ),
}
