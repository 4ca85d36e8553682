"""Hosts that a task does not have itself."""

from torch import Tensor
from torch import nn


def nest(block: nn.Module, levels: int) -> nn.Module:
    """Puts a block into so many containers, each of which is a place for a slot.

    The seeds of one slot own parts of its features; several seeds over all features of a block need
    several slots around it. The names are ``""``, ``"0"``, ``"0.0"`` and so on.
    """
    for _ in range(levels):
        block = nn.Sequential(block)
    return block


def nested_names(prefix: str, levels: int) -> list[str]:
    """Returns the names of the containers that ``nest`` has put around a block, outermost first."""
    return [".".join([prefix] + ["0"] * level) for level in range(levels)]


class DeepMLP(nn.Module):
    """A multilayer perceptron that is deepened at places where nothing stands yet.

    A place is an identity; a residual seed on it makes it a residual block of two layers.

    Args:
        width: Width of the hidden features.
        places: Number of places.
        inputs: Number of inputs.
        classes: Number of classes.
    """

    def __init__(self, width: int, places: int, inputs: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
        self.places = nn.Sequential(*(nn.Identity() for _ in range(places)))
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns class scores, [samples, classes], for inputs [samples, ...]."""
        scores: Tensor = self.head(self.places(self.stem(inputs.flatten(1))))
        return scores
