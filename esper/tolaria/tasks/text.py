"""Character language modelling on the text of Python's own standard library.

The text is on every machine that runs Esper, real, and large enough. It depends on the Python
release, so results name it. Whole modules go to one split: no line of a test module was ever
trained on.
"""

import sysconfig
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from esper.tolaria.tasks.task import Split
from esper.tolaria.tasks.task import Task

WINDOW = 64
"""Characters that a sample predicts."""

NUM_CHARACTERS = 97
"""Newline, the 95 printable ASCII characters, and one that stands for all others."""

EPOCH_SAMPLES = 512
NUM_HELD_OUT = 256
NUM_TEST = 2048

_VALIDATION_MODULES = ("argparse", "heapq", "shutil", "textwrap", "zipfile")
_TEST_MODULES = ("ast", "calendar", "dataclasses", "fractions", "socket", "tarfile")
_OTHER = NUM_CHARACTERS - 1


class CharTransformer(nn.Module):
    """A small causal transformer.

    Args:
        hidden: Hidden features of each feed-forward block, which growth may widen.
        width: Features between the blocks.
        layers: Number of blocks.
        heads: Attention heads.
    """

    def __init__(
        self, hidden: int = 16, *, width: int = 48, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_CHARACTERS, width)
        self.position = nn.Parameter(0.02 * torch.randn(WINDOW, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        """Returns scores of the next character, [samples, positions, characters].

        Args:
            characters: Numbers of the characters, int64 [samples, positions], at most 64 positions.
        """
        hidden = self.embedding(characters) + self.position[: characters.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        scores: Tensor = self.head(self.norm(hidden))
        return scores


class TransformerBlock(nn.Module):
    """Causal attention and a feed-forward block, each behind a norm and around a residual."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output, [samples, positions, width], as is its input."""
        mixed = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        widened: Tensor = x + self.mlp(self.mlp_norm(x))
        return widened


def text() -> Task:
    """The top-level modules of the standard library as a task; its loss is in nats a character."""
    folder = Path(sysconfig.get_path("stdlib"))
    held_out = {*_VALIDATION_MODULES, *_TEST_MODULES}
    train = sorted(path.stem for path in folder.glob("*.py") if path.stem not in held_out)
    pick = partial(_windows, folder)
    return Task(
        name="text",
        train=pick(train, None),
        validation=pick(_VALIDATION_MODULES, NUM_HELD_OUT),
        test=pick(_TEST_MODULES, NUM_TEST),
        host_size=16,
        batch_size=32,
        epoch_samples=EPOCH_SAMPLES,
        _build_host=CharTransformer,
    )


def encode(content: str) -> Tensor:
    """Returns the numbers of a text's characters, int64 [characters]."""
    codes = torch.tensor([ord(character) for character in content], dtype=torch.int64)
    numbers = torch.where((codes >= 32) & (codes < 127), codes - 31, _OTHER)
    return torch.where(codes == ord("\n"), 0, numbers)


def _windows(folder: Path, modules: tuple[str, ...] | list[str], limit: int | None) -> Split:
    """Returns windows of the modules' text that do not overlap; `limit` of them, evenly spread."""
    content = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in modules)
    numbers = encode(content)
    windows = numbers[: len(numbers) // (WINDOW + 1) * (WINDOW + 1)].reshape(-1, WINDOW + 1)
    if limit is not None:
        windows = windows[torch.linspace(0, len(windows) - 1, min(limit, len(windows))).long()]
    return Split(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
