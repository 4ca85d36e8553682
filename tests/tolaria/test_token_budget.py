"""A budget of operations per sample means what all tokens of a sample cost."""

import torch
from torch import Tensor
from torch import nn

import esper
from esper.config import BudgetConfig
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.config import GrowthConfig
from esper.tolaria.trainer import train_epoch

NUM_TOKENS = 12


class Tokens(nn.Module):
    """Marks every token of a sequence, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 9))

    def forward(self, tokens: Tensor) -> Tensor:
        marks: Tensor = self.mlp(self.embedding(tokens))
        return marks


def _loss(model: nn.Module, batch: object) -> Tensor:
    tokens, marks = batch  # type: ignore[misc]
    return nn.functional.cross_entropy(model(tokens).mT, marks, reduction="none").mean(1)


def test_the_controller_asks_for_what_all_tokens_of_a_sample_may_cost(plane: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(9, (8, 16, NUM_TOKENS))
    batches = list(zip(tokens, (tokens * 2 + 1) % 9, strict=True))
    model = esper.wrap(Tokens(), target_layers=["mlp"], seeds_per_layer=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    host = NUM_TOKENS * 2 * (6 * 8 + 8 * 9)
    spare = NUM_TOKENS * 100  # of a bottleneck of rank 2 and not 4, or one of any rank per token
    config = EsperConfig(
        candidates=(Candidate(blueprint="widen", ranks=(2, 4, 8)),),
        graft=GraftConfig(training_steps=2, ramp_steps=2, stabilization_steps=1),
        growth=GrowthConfig(first_epoch=0, min_score_ratio=0.0, max_slot_growth=10.0),
        budget=BudgetConfig(max_flops_per_sample=host + spare),
    )
    session = esper.session(
        model,
        optimizer,
        epochs=4,
        held_out=batches[:1],
        loss=_loss,
        plane=plane,
        mode="lockstep",
        config=config,
    )
    with session:
        for _ in range(4):
            train_epoch(model, optimizer, batches[1:], _loss)
            session.epoch_end()
            for at in model.occupied_seeds():
                kernel = model.kernel_of(*at)
                assert kernel is not None and kernel.bottleneck.rank == 2
    assert [event.after for event in session.history.events][:1] == ["GERMINATED"]
    assert session.history.refusals == []
