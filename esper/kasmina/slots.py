"""The slots of a model by name, in a module that saves and copies like any other."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping

from torch import nn

from esper.kasmina.layer import KasminaLayer


class SlotTable(nn.Module, Mapping[str, KasminaLayer]):
    """Slots by the FQN of their module, in the host's order.

    A module's children cannot have dots in their names, so in ``state_dict`` a dot of the slot's
    name becomes a slash: the first seed of ``blocks.0.mlp`` is ``slots.blocks/0/mlp.grafts.0``.

    Args:
        layers: The slots.
    """

    def __init__(self, layers: Iterable[KasminaLayer]) -> None:
        super().__init__()
        self._keys: dict[str, str] = {}
        for layer in layers:
            key = encode(layer.name)
            if hasattr(self, key):  # such as a host module called `training`
                key += "~"
            self._keys[layer.name] = key
            self.add_module(key, layer)

    def __getitem__(self, name: str) -> KasminaLayer:
        layer = self._modules[self._keys[name]]
        assert isinstance(layer, KasminaLayer)
        return layer

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    # Mapping compares by content; modules are compared, and hashed, by identity.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


def encode(name: str) -> str:
    """Returns a name without dots; different names stay different.

    A tilde becomes ``~0`` and a slash ``~1`` (as in RFC 6901), so that a dot can become a slash.
    """
    return name.replace("~", "~0").replace("/", "~1").replace(".", "/")
