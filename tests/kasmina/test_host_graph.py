import copy

import torch
from torch import nn

from esper.common.v1 import kernel_pb2
from esper.kasmina import wrap


class Crossed(nn.Module):
    """Registered in another order than it runs."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 4)
        self.first = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.unused = nn.Linear(2, 4)

    def forward(self, x):
        return self.last(self.first(x))


def edges(graph):
    names = [node.name for node in graph.nodes]
    return [(names[getattr(edge, "from")], names[edge.to]) for edge in graph.edges]


def test_edges_follow_registration_first_and_then_execution():
    model = wrap(Crossed(), ["first", "last"])
    before = model.host_graph()
    assert [node.name for node in before.nodes] == ["last", "first", "first.0", "unused"]
    assert edges(before) == [("last", "first"), ("first", "first.0"), ("first.0", "unused")]
    model(torch.randn(3, 6))
    after = model.host_graph()
    assert edges(after) == [("first.0", "first"), ("first", "last")]
    assert after.digest != before.digest
    assert model.host_graph().digest == after.digest


def test_nodes_tell_what_they_are():
    model = wrap(Crossed(), ["first", "last"])
    graph = model.host_graph()
    nodes = {node.name: node for node in graph.nodes}
    assert nodes["first.0"].type == "Linear" and nodes["first.0"].num_parameters == 56
    assert nodes["first"].type == "Sequential" and nodes["first"].num_parameters == 0
    assert not nodes["first.0"].HasField("slot")
    last = nodes["last"].slot
    assert (last.kind, last.width, last.source_width) == (kernel_pb2.SLOT_KIND_LINEAR, 4, 8)
    assert list(last.chunk_widths) == [1, 1, 1, 1]
    assert last.dtype == kernel_pb2.DATA_TYPE_FLOAT32
    assert last.device_class == kernel_pb2.DEVICE_CLASS_CPU
    assert not nodes["first"].slot.HasField("width")
    model(torch.randn(3, 6))
    first = {node.name: node for node in model.host_graph().nodes}["first"].slot
    assert (first.width, first.source_width, list(first.chunk_widths)) == (8, 6, [2, 2, 2, 2])


def test_the_digest_depends_on_structure_alone():
    def digest(seed, width=8, training_steps=1):
        torch.manual_seed(seed)
        model = wrap(nn.Sequential(nn.Linear(6, width), nn.Linear(width, 4)))
        for _ in range(training_steps):
            model(torch.randn(3, 6))
        return model.host_graph().digest

    assert digest(0) == digest(1) == digest(0, training_steps=3)
    assert digest(0) != digest(0, width=9)


def test_a_module_used_twice_is_an_edge_back():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.b(self.a(x)))

    model = wrap(Loop())
    model(torch.randn(2, 4))
    assert edges(model.host_graph()) == [("a", "b"), ("b", "a")]
    assert edges(copy.deepcopy(model).host_graph()) == [("a", "b"), ("b", "a")]


def test_seeds_are_no_part_of_the_hosts_graph():
    model = wrap(Crossed(), ["first", "last"])
    model(torch.randn(3, 6))
    digest = model.host_graph().digest
    model.germinate("last", 0, "lora", rank=1)
    assert model.host_graph().digest == digest
