"""Where the seeds of a slot read: the slot's own module, or for a bridge one that ran before it."""

import inspect
from collections.abc import Mapping

from torch import Tensor
from torch import nn
from torch.utils.hooks import RemovableHandle

from esper.kasmina.sites import Site


class Inlet:
    """Finds the tensor that seeds read; for a bridge, keeps it from the first module to the last.

    Args:
        site: Where the slot sits.

    Attributes:
        name: FQN of the module whose input is read, for a bridge; None for the slot's own.
        module: That module, or the slot's own.
        reads_first: Whether what is read is the module's very first input, as far as it was seen.
    """

    def __init__(self, site: Site) -> None:
        self.name: str | None = None
        self.module = site.module
        if site.entry is not None:
            self.name, self.module = site.entry
        self.reads_first = True
        self._input_names = tuple(inspect.signature(self.module.forward).parameters)
        self._kept: Tensor | None = None
        self._handle: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}  # of a forward that never came to the slot

    def attach(self) -> None:
        """Begins to keep what the first module of a bridge is given."""
        if self.name is not None and self._handle is None:
            self._handle = self.module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def detach(self) -> None:
        """Ends it."""
        self._kept = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def take(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
        """Returns what seeds read in this call of the slot's module; None where there is nothing.

        Args:
            args: Positional inputs of the slot's module.
            kwargs: Its keyword inputs.
        """
        if self.name is None:
            return self._find(args, kwargs)
        kept, self._kept = self._kept, None
        return kept

    def _keep(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        self._kept = self._find(args, kwargs)

    def _find(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
        """The first floating-point tensor among the module's inputs, in the order it names them."""
        named = (kwargs[name] for name in self._input_names if name in kwargs)
        for value in (*args, *named):
            if isinstance(value, Tensor) and value.is_floating_point() and not value.is_nested:
                first = args[0] if args else kwargs.get(next(iter(self._input_names), ""))
                self.reads_first = value is first
                return value
        return None
