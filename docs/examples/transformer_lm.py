"""A small transformer that learns to write Python from the standard library, and grows meanwhile.

python docs/examples/transformer_lm.py
"""

import argparse
import inspect

import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.config import GraftConfig
from esper.config import GrowthConfig

CONTEXT = 32


class LanguageModel(nn.Module):
    def __init__(self, num_tokens, width=32, num_layers=2):
        super().__init__()
        self.token = nn.Embedding(num_tokens, width)
        self.position = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_tokens)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, ids):
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        return self.head(self.layers(x, mask=self.mask, is_causal=True))


def sample_loss(model, batch):
    ids, following = batch
    losses = F.cross_entropy(model(ids).transpose(1, 2), following, reduction="none")
    return losses.mean(dim=1)


def windows(text, ids):
    starts = torch.arange(0, len(text) - CONTEXT - 1, CONTEXT)
    index = starts[:, None] + torch.arange(CONTEXT)
    return ids[index], ids[index + 1]


def main(epochs=8):
    torch.manual_seed(0)
    text = inspect.getsource(argparse)[:40000]
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(character) for character in text])
    inputs, targets = windows(text, ids)
    order = torch.randperm(len(inputs))
    held_out, train = order[:200], order[200:]
    held_out_batches = [(inputs[held_out], targets[held_out])]

    model = esper.wrap(LanguageModel(len(characters)), "auto", seeds_per_layer=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # Growth scores stand out while the model learns fast, which is in the first epochs here.
    config = esper.EsperConfig(
        telemetry_interval=4,
        growth=GrowthConfig(first_epoch=0),
        graft=GraftConfig(training_steps=10, ramp_steps=20, stabilization_steps=5),
    )
    session = esper.session(
        model,
        optimizer,
        config=config,
        epochs=epochs,
        held_out=held_out_batches,
        loss=sample_loss,
        mode="lockstep",  # the run takes seconds: wait for advice
    )

    with session:
        for epoch in range(epochs):
            for rows in train[torch.randperm(len(train))].split(32):
                optimizer.zero_grad()
                loss = sample_loss(model, (inputs[rows], targets[rows])).mean()
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
