"""Growth in a Lightning ``Trainer``; needs the extra ``lightning``."""

from collections.abc import Collection

import lightning
from torch import Tensor
from torch import nn

from esper.adapters.keeper import SessionKeeper
from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.tolaria.evaluation import Batch
from esper.tolaria.evaluation import SampleLoss
from esper.tolaria.link import Address
from esper.tolaria.mode import Mode


class GrowthCallback(SessionKeeper, lightning.Callback):  # type: ignore[misc]
    """Opens a session when training starts, ends its epochs, and closes it.

    The wrapped model is the first one found in the ``LightningModule``, such as
    ``self.net = esper.wrap(net, "auto")``. All optimizers of the trainer count.

    Args:
        held_out: Held-out batches, see ``SessionKeeper``.
        loss: See ``SessionKeeper``.
        plane: See ``SessionKeeper``.
        mode: See ``SessionKeeper``.
        config: See ``SessionKeeper``; ``gradient_clip_val`` clips newborns too.
        train_loss: Name under which the module logs its training loss; absent is not measured.
    """

    def __init__(
        self,
        *,
        held_out: Collection[Batch],
        loss: SampleLoss,
        plane: Address | None = None,
        mode: Mode = "async",
        config: EsperConfig | None = None,
        train_loss: str = "train_loss",
    ) -> None:
        super().__init__(held_out=held_out, loss=loss, plane=plane, mode=mode, config=config)
        self._train_loss = train_loss

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Opens the session.

        Raises:
            ValueError: If the module holds no wrapped model, the trainer has no number of epochs,
                or an argument breaks its rule.
        """
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ValueError(
                f"max_epochs is {trainer.max_epochs}, but growth needs a planned number of epochs"
            )
        clips_by_norm = trainer.gradient_clip_algorithm in (None, "norm")
        self._open(
            _wrapped(pl_module),
            trainer.optimizers,
            epochs=trainer.max_epochs,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            max_gradient_norm=trainer.gradient_clip_val if clips_by_norm else None,
        )

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Ends the session's epoch."""
        assert self._session is not None, "training has started"
        logged = trainer.callback_metrics.get(self._train_loss)
        self._session.epoch_end(train_loss=float(logged) if isinstance(logged, Tensor) else None)

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Closes the session, after an error too."""
        self._close()


def _wrapped(module: nn.Module) -> MorphableModel:
    for candidate in module.modules():
        if isinstance(candidate, MorphableModel):
            return candidate
    raise ValueError(
        f"{type(module).__name__} holds no wrapped model: set one of its attributes to "
        "esper.wrap(...)"
    )
