"""Growth in a Hugging Face ``Trainer``; needs the extra ``huggingface``."""

import math
from collections.abc import Collection

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers import TrainerControl
from transformers import TrainerState
from transformers import TrainingArguments

from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.tolaria.evaluation import Batch
from esper.tolaria.evaluation import SampleLoss
from esper.tolaria.history import History
from esper.tolaria.link import Address
from esper.tolaria.mode import Mode
from esper.tolaria.session import Session


class GrowthCallback(TrainerCallback):  # type: ignore[misc]
    """Opens a session when training begins, ends its epochs, and closes it.

    The ``Trainer`` is given the wrapped model. It reads the names of a model's inputs off its
    ``forward``, which a wrapped model passes on as they come, so two settings say what it cannot
    see: ``TrainingArguments(remove_unused_columns=False)``, ``model.accepts_loss_kwargs = False``.

    Args:
        held_out: Held-out batches, see ``Session``.
        loss: Maps (wrapped model, batch) to per-sample losses, shape [samples].
        plane: Address of a plane, or ``None`` to start an embedded one.
        mode: ``async`` or ``lockstep``, see ``Session``.
        config: Growth configuration; ``None`` means the defaults.

    Attributes:
        history: The run's history, once training has begun.
    """

    def __init__(
        self,
        *,
        held_out: Collection[Batch],
        loss: SampleLoss,
        plane: Address | None = None,
        mode: Mode = "async",
        config: EsperConfig | None = None,
    ) -> None:
        self.history: History | None = None
        self._held_out = held_out
        self._loss = loss
        self._plane = plane
        self._mode: Mode = mode
        self._config = config
        self._session: Session | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **others: object,
    ) -> None:
        """Opens the session.

        Raises:
            ValueError: If the model is not wrapped, or an argument breaks its rule.
        """
        if not isinstance(model, MorphableModel):
            raise ValueError(
                f"model is a {type(model).__name__}, but growth needs the wrapped model: give the "
                "Trainer what esper.wrap returned"
            )
        self._session = Session(
            model,
            getattr(optimizer, "optimizer", optimizer),  # accelerate's wrapper has it inside
            epochs=math.ceil(state.num_train_epochs),
            held_out=self._held_out,
            loss=self._loss,
            plane=self._plane,
            mode=self._mode,
            config=self._config,
            scaler=getattr(optimizer, "scaler", None),
        )
        self.history = self._session.history

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: object,
    ) -> None:
        """Ends the session's epoch."""
        if self._session is not None:
            self._session.epoch_end()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: object,
    ) -> None:
        """Closes the session."""
        if self._session is not None:
            self._session.close()
            self._session = None
