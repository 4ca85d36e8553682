"""Held-out trials: every graft that has settled is kept or refused by data it never trained on."""

from collections.abc import Collection

from torch import Tensor

from esper.blueprints.digest import kernel_digest
from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria.cost import TrainingCost
from esper.tolaria.decisions import flops_per_sample
from esper.tolaria.evaluation import Batch
from esper.tolaria.evaluation import SampleLoss
from esper.tolaria.evaluation import paired_trial
from esper.tolaria.evaluation import sample_losses
from esper.tolaria.evaluation import trial_level
from esper.tolaria.history import TrialRecord
from esper.tolaria.live_grafts import LiveGraft
from esper.tolaria.protocol import GraftProtocol
from esper.tolaria.ranks import Ranks


class Trials:
    """Holds the trials of one run.

    Args:
        model: The growing model.
        held_out: What the losses are measured on.
        loss: Per-sample loss.
        protocol: Knows which grafts are due, and carries out the verdicts.
        cost: Is charged for every pass over the held-out data.
        config: Level of the test over the run, and the price of a seed.
        ranks: The processes that share the work; all of them reach the same verdicts.
    """

    def __init__(
        self,
        model: MorphableModel,
        held_out: Collection[Batch],
        loss: SampleLoss,
        protocol: GraftProtocol,
        cost: TrainingCost,
        config: EsperConfig,
        ranks: Ranks,
    ) -> None:
        self._model = model
        self._held_out = held_out
        self._loss = loss
        self._protocol = protocol
        self._cost = cost
        self._config = config
        self._ranks = ranks

    def are_due(self, *, last: bool) -> bool:
        """Returns whether a graft waits for a trial that needs the held-out losses.

        Args:
            last: Whether the run's last epoch ends.
        """
        return self._config.accept != "always" and bool(self._protocol.due_for_trial(last=last))

    def hold(
        self, epoch: int, records: list[TrialRecord], losses: Tensor | None, *, last: bool
    ) -> Tensor | None:
        """Brings every graft that is due to its verdict.

        Args:
            epoch: The epoch that ends.
            records: All trials of the run so far; those held now are added. Each that was not
                passed has spent its share of the level.
            losses: Held-out losses of the model as it is, [samples]; ``None`` where they were not
                measured, as then none are due.
            last: Whether the run's last epoch ends.

        Returns:
            Held-out losses of the model as it is left.
        """
        due = self._protocol.due_for_trial(last=last)
        if self._config.accept == "always":
            for graft in due:
                self._protocol.keep(graft, "kept without a trial")
            return losses
        if not due:
            return losses
        assert losses is not None, "they are measured where trials are due"
        with_seed = losses
        for graft in due:
            with self._model.muted(*graft.key):
                without_seed = self._losses()
            self._cost.add_trial(len(without_seed))
            flops = flops_per_sample(self._model, graft.slot, graft.kernel)
            num_failed = sum(not record.accepted for record in records)
            measured = paired_trial(
                with_seed,
                without_seed,
                level=trial_level(self._significance(graft), 1 + num_failed),
                price=self._config.budget.min_gain_per_mflop * flops / 1e6,
            )
            trial = self._ranks.broadcast(measured)
            records.append(
                TrialRecord(
                    epoch=epoch,
                    slot=graft.slot,
                    seed=graft.seed,
                    kernel=kernel_digest(graft.kernel),
                    accepted=trial.accepted,
                    gain=trial.gain,
                    low=trial.low,
                    high=trial.high,
                    price=trial.price,
                    p_value=trial.p_value,
                    level=trial.level,
                    flops_per_sample=flops,
                )
            )
            self._protocol.conclude(graft, trial)
            if graft.key not in self._protocol.live and not trial.accepted:
                with_seed = without_seed
        return with_seed

    def _losses(self) -> Tensor:
        return sample_losses(self._model, self._held_out, self._loss, self._ranks)

    def _significance(self, graft: LiveGraft) -> float:
        if graft.plan.HasField("significance"):
            return min(graft.plan.significance, self._config.significance)
        return self._config.significance


def to_proto(record: TrialRecord) -> controller_pb2.TrialOutcome:
    """Returns a trial as the controller is told of it."""
    return controller_pb2.TrialOutcome(
        slot=record.slot,
        seed=record.seed,
        accepted=record.accepted,
        gain=record.gain,
        flops_per_sample=record.flops_per_sample,
    )
