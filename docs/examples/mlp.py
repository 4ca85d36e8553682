"""A perceptron on scikit-learn's digits that grows while it trains.

    python docs/examples/mlp.py

The loop is the usual one of torch; the lines that mention esper are all that growth takes.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset
from torch.utils.data import random_split

import esper


def sample_loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def main(epochs=20):
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    train, held_out = random_split(TensorDataset(images, torch.tensor(digits.target)), [1397, 400])
    train_batches = DataLoader(train, batch_size=64, shuffle=True)
    held_out_batches = DataLoader(held_out, batch_size=400)

    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    model = esper.wrap(model, "auto", seeds_per_layer=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session = esper.session(
        model,
        optimizer,
        epochs=epochs,
        held_out=held_out_batches,
        loss=sample_loss,
        mode="lockstep",  # the run takes seconds: wait for advice
    )

    with session:
        for epoch in range(epochs):
            for batch in train_batches:
                loss = sample_loss(model, batch).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            record = session.epoch_end(train_loss=loss.item())
            print(
                f"epoch {epoch}: held-out loss {record.held_out_loss:.4f}, "
                f"{record.parameters} parameters"
            )
    return session.history


if __name__ == "__main__":
    main()
