"""A convolutional network on scikit-learn's digits that grows while it trains.

    python docs/examples/cnn.py

The learning rate is scheduled, as in many loops, and newborns follow. Gradients are clipped: that
means the host, and newborns have a bound of their own.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset
from torch.utils.data import random_split

import esper
from esper.config import EsperConfig
from esper.config import GraftConfig


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.conv2(x))
        return self.head(F.max_pool2d(x, 2).amax((2, 3)))


def sample_loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def main(epochs=15):
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    train, held_out = random_split(TensorDataset(images, torch.tensor(digits.target)), [1397, 400])
    train_batches = DataLoader(train, batch_size=64, shuffle=True)
    held_out_batches = DataLoader(held_out, batch_size=400)

    model = esper.wrap(Net(), "auto", seeds_per_layer=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, epochs=epochs, steps_per_epoch=len(train_batches)
    )
    session = esper.session(
        model,
        optimizer,
        epochs=epochs,
        held_out=held_out_batches,
        loss=sample_loss,
        mode="lockstep",  # the run takes seconds: wait for advice
        config=EsperConfig(graft=GraftConfig(max_gradient_norm=1.0)),
    )

    with session:
        for epoch in range(epochs):
            model.train()
            for batch in train_batches:
                optimizer.zero_grad()
                loss = sample_loss(model, batch).mean()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
            record = session.epoch_end(train_loss=loss.item())
            print(
                f"epoch {epoch}: held-out loss {record.held_out_loss:.4f}, "
                f"{record.parameters} parameters"
            )
    return session.history


if __name__ == "__main__":
    main()
