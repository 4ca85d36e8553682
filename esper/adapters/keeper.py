"""What all adapters have in common: they keep the session of somebody else's trainer."""

from collections.abc import Collection
from collections.abc import Sequence
from dataclasses import replace

from torch.amp import GradScaler
from torch.optim import Optimizer

from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.tolaria.evaluation import Batch
from esper.tolaria.evaluation import SampleLoss
from esper.tolaria.history import History
from esper.tolaria.link import Address
from esper.tolaria.mode import Mode
from esper.tolaria.session import Session


class SessionKeeper:
    """Keeps what a session is made of until the trainer begins, and then the session.

    Args:
        held_out: Held-out batches, see ``Session``.
        loss: Maps (wrapped model, batch) to per-sample losses, shape [samples].
        plane: Address of a plane, or ``None`` to start an embedded one.
        mode: ``async`` or ``lockstep``, see ``Session``.
        config: Growth configuration; ``None`` means the defaults. Newborns are clipped by the norm
            that the trainer clips by, unless ``graft.max_gradient_norm`` says otherwise.

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
        self._config = config if config is not None else EsperConfig()
        self._session: Session | None = None

    def _open(
        self,
        model: MorphableModel,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        epochs: int,
        scaler: GradScaler | None,
        max_gradient_norm: float | None,
    ) -> None:
        config = self._config
        if config.graft.max_gradient_norm is None:
            graft = replace(config.graft, max_gradient_norm=max_gradient_norm or None)
            config = replace(config, graft=graft)
        self._session = Session(
            model,
            optimizers,
            epochs=epochs,
            held_out=self._held_out,
            loss=self._loss,
            plane=self._plane,
            mode=self._mode,
            config=config,
            scaler=scaler,
        )
        self.history = self._session.history

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
