"""Averages of a growing model: EMA and SWA that keep step with its seeds."""

from collections.abc import Callable
from collections.abc import Sequence

from torch import Tensor
from torch import nn
from torch.optim.swa_utils import AveragedModel

from esper.common.v1 import kernel_pb2
from esper.kasmina import MorphableModel

SeedKey = tuple[str, int]
AverageFunction = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]
"""Moves averages towards values: (averages, values, number of updates so far)."""


class GrowingAverage(AveragedModel):
    """``torch.optim.swa_utils.AveragedModel`` of a wrapped model.

    torch's own holds a copy with the parameters of the moment when it was made: what grows later is
    missing, and what is culled shifts every parameter behind it. This one plants, blends and culls
    in its copy whatever the model has planted, blended and culled. The average of a seed starts, as
    torch's does, with a copy of its weights at the first update that sees it; under the equal
    weights of SWA they count for all updates before.

    Made, updated and used as torch's; in ``Session(stateful=...)`` it is saved and resumed.

    Args:
        model: The wrapped model.
        multi_avg_fn: How tensors are averaged, such as ``get_ema_multi_avg_fn(0.999)``; ``None``
            is the equally weighted mean.
        use_buffers: Whether buffers are averaged too, instead of being copied.

    Raises:
        ValueError: If the model is not wrapped; torch's own class serves any other.
    """

    def __init__(
        self,
        model: MorphableModel,
        multi_avg_fn: AverageFunction | None = None,
        use_buffers: bool = False,
    ) -> None:
        if not isinstance(model, MorphableModel):
            raise ValueError(
                f"model is a {type(model).__name__}, but it must be a wrapped model; use torch's "
                "AveragedModel for any other"
            )
        super().__init__(model, multi_avg_fn=multi_avg_fn, use_buffers=use_buffers)
        self._source = (model,)  # in a tuple: it is no part of the average
        self._followed = (-1, b"")  # revision and seed bank of the model
        # Whatever is saved or loaded has the structure that the model has then.
        self.register_state_dict_pre_hook(lambda *_: self.follow())  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(lambda *_: self.follow())  # type: ignore[no-untyped-call]

    def update_parameters(self, model: nn.Module) -> None:
        """Takes in the weights of the model, as they are after a step.

        Raises:
            ValueError: If it is another model than the one that the average was made of.
        """
        if model is not self._source[0]:
            raise ValueError("model is another one than the average was made of")
        self.follow()
        super().update_parameters(model)

    def follow(self) -> None:
        """Brings the seeds of the average to where those of the model are; weights stay."""
        source, twin = self._source[0], self.module
        assert isinstance(twin, MorphableModel)
        bank = source.bank.to_bytes()
        if self._followed == (source.revision, bank):
            return
        grafts: dict[SeedKey, tuple[kernel_pb2.Kernel, dict[str, Tensor]]] = {}
        folded: list[SeedKey] = []
        for key in source.occupied_seeds():
            kernel = source.kernel_of(*key)
            assert kernel is not None, "an occupied seed holds a kernel"
            own = twin.kernel_of(*key)
            if own is not None and own.parameters and not kernel.parameters:
                folded.append(key)  # the model has written it into its weight
                kernel = own
            known = own == kernel
            grafts[key] = (kernel, _weights(twin if known else source, key, kernel))
        slots = {name: layer.slot_state() for name, layer in source.slots.items()}
        twin.restore(bank, slots, grafts, over=True)
        for key in folded:
            twin.fold(*key)
        self._followed = (source.revision, bank)


def _weights(model: MorphableModel, key: SeedKey, kernel: kernel_pb2.Kernel) -> dict[str, Tensor]:
    parameters = model.seed_parameters(*key)
    return {
        spec.name: parameter.detach()
        for spec, parameter in zip(kernel.parameters, parameters, strict=True)
    }
