"""A table of numbers whose classes are scattered clusters, so that the right size is not obvious.

It is drawn by scikit-learn's ``make_classification``, after the MADELON data of I. Guyon (NIPS 2003
feature selection challenge): every class is a union of clusters on the corners of a hypercube.
"""

import torch
from torch import Tensor
from torch import nn

from esper.tolaria.tasks.task import Split
from esper.tolaria.tasks.task import Task

TABLE_SEED = 20_240_229
"""Fixes the table, whatever the seed of a run is."""

NUM_FEATURES = 20
NUM_CLASSES = 6
NUM_TRAIN, NUM_HELD_OUT = 3000, 1000


class TableMLP(nn.Module):
    """A multilayer perceptron with one hidden layer.

    Args:
        hidden: Width of the hidden layer.
    """

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(NUM_FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, NUM_CLASSES)
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Returns class scores, shape [samples, 6], for rows of shape [samples, 20]."""
        scores: Tensor = self.net(rows)
        return scores


def table() -> Task:
    """The table, split 3000 / 1000 / 1000."""
    # Imported late: scikit-learn takes longer to import than the whole of Esper.
    from sklearn.datasets import make_classification

    rows, labels = make_classification(
        n_samples=NUM_TRAIN + 2 * NUM_HELD_OUT,
        n_features=NUM_FEATURES,
        n_informative=10,
        n_redundant=4,
        n_classes=NUM_CLASSES,
        n_clusters_per_class=4,
        class_sep=1.5,
        random_state=TABLE_SEED,
    )
    inputs = torch.from_numpy(rows).to(torch.float32)
    targets = torch.from_numpy(labels).to(torch.int64)
    train = inputs[:NUM_TRAIN]
    inputs = (inputs - train.mean(dim=0)) / train.std(dim=0)
    sizes = (NUM_TRAIN, NUM_HELD_OUT, NUM_HELD_OUT)
    parts = zip(inputs.split(sizes), targets.split(sizes), strict=True)
    train_split, validation, test = (Split(*part) for part in parts)
    return Task(
        name="table",
        train=train_split,
        validation=validation,
        test=test,
        host_size=8,
        batch_size=64,
        _build_host=TableMLP,
    )
