"""The host as a graph: its modules and slots, and the order in which data passes through them."""

import contextlib
import hashlib
from collections.abc import Iterator
from collections.abc import Sequence

from torch import nn

from esper.common.v1 import signal_pb2
from esper.kasmina.places import slot_info
from esper.kasmina.slots import SlotTable


def node_names(host: nn.Module, slots: SlotTable) -> list[str]:
    """Returns the FQNs of the graph's nodes: modules with parameters of their own, and slots."""
    return [
        name
        for name, module in host.named_modules()
        if name in slots or any(True for _ in module.parameters(recurse=False))
    ]


@contextlib.contextmanager
def record_execution(host: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Notes which modules finish in which order while the context is open.

    Args:
        host: The model.
        names: FQNs of the modules to watch.

    Yields:
        The list of names that the forward fills.
    """
    order: list[str] = []
    handles = [
        host.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: order.append(name)
        )
        for name in names
    ]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def host_graph(
    host: nn.Module, slots: SlotTable, order: Sequence[str] | None
) -> signal_pb2.HostGraph:
    """Returns the host as a graph.

    Args:
        host: The model.
        slots: Its slots.
        order: Modules in order of execution; None before any was seen, which takes the order of
            registration.
    """
    names = node_names(host, slots)
    graph = signal_pb2.HostGraph()
    for name in names:
        module = host.get_submodule(name)
        node = graph.nodes.add(
            name=name,
            type=type(module).__name__,
            num_parameters=sum(p.numel() for p in module.parameters(recurse=False)),
        )
        if name in slots:
            node.slot.CopyFrom(slot_info(slots[name]))
    index = {name: position for position, name in enumerate(names)}
    path = [index[name] for name in (names if order is None else order)]
    for source, target in dict.fromkeys(zip(path, path[1:], strict=False)):
        edge = graph.edges.add(to=target)
        setattr(edge, "from", source)  # a keyword of Python
    graph.digest = hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()
    return graph
