"""Growth in a Hugging Face ``Trainer``; needs the extra ``huggingface``."""

import math

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers import TrainerControl
from transformers import TrainerState
from transformers import TrainingArguments

from esper.adapters.keeper import SessionKeeper
from esper.kasmina import MorphableModel


class GrowthCallback(SessionKeeper, TrainerCallback):  # type: ignore[misc]
    """Opens a session when training begins, ends its epochs, and closes it.

    The ``Trainer`` is given the wrapped model. It reads the names of a model's inputs off its
    ``forward``, which a wrapped model passes on as they come, so two settings say what it cannot
    see: ``TrainingArguments(remove_unused_columns=False)``, ``model.accepts_loss_kwargs = False``.

    Its arguments are those of ``SessionKeeper``; ``max_grad_norm`` clips newborns too.
    """

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
        self._open(
            model,
            getattr(optimizer, "optimizer", optimizer),  # accelerate's wrapper has it inside
            epochs=math.ceil(state.num_train_epochs),
            scaler=getattr(optimizer, "scaler", None),
            max_gradient_norm=args.max_grad_norm,
        )

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
        self._close()
