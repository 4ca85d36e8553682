import dataclasses
from collections import OrderedDict
from collections import namedtuple

import pytest
import torch

from esper.kasmina.outputs import find_tensor
from esper.kasmina.outputs import replace_tensor
from esper.kasmina.outputs import restore_layout

Pair = namedtuple("Pair", "first second")
H = torch.arange(6.0).view(2, 3)
IDS = torch.arange(3)


@dataclasses.dataclass(frozen=True)
class Record:
    hidden: torch.Tensor
    count: int = 3


class ModelOutput(OrderedDict):
    """As model libraries make them: keys are attributes, too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@pytest.mark.parametrize(
    ("output", "path"),
    [
        (H, ()),
        ((H, None), (("tuple", 0),)),
        ([IDS, (None, H)], (("list", 1), ("tuple", 1))),
        ({"ids": IDS, "h": H}, (("dict", "h"),)),
        (Pair(IDS, H), (("Pair", 1),)),
        (Record(H), (("Record", "hidden"),)),
        (ModelOutput(ids=IDS, last=(H,)), (("ModelOutput", "last"), ("tuple", 0))),
        ((H, H + 1), (("tuple", 0),)),
    ],
)
def test_the_first_floating_point_tensor_is_found_and_replaced(output, path):
    found = find_tensor(output)
    assert found is not None
    assert found[0] == path and found[1] is H
    new = torch.zeros(2, 3)
    replaced = replace_tensor(output, path, new)
    assert type(replaced) is type(output)
    assert find_tensor(replaced) is not None and find_tensor(replaced)[1] is new
    assert find_tensor(output)[1] is H  # the original is left alone
    if isinstance(output, ModelOutput):
        assert replaced.last[0] is new and replaced.ids is IDS


@pytest.mark.parametrize("output", [IDS, None, (IDS, "x"), {"n": 3}, Record, []])
def test_without_one_there_is_none(output):
    assert find_tensor(output) is None


@pytest.mark.parametrize(
    "host",
    [
        torch.randn(2, 3, 4, 5),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 5, 3, 2).permute(3, 2, 0, 1),
        torch.randn(2, 6, 4, 5)[:, ::2],
        torch.randn(2, 3, 1, 1),
    ],
)
@pytest.mark.parametrize("axis", [None, 1])
def test_layout_is_that_of_the_host(host, axis):
    y = (host if axis is None else host.movedim(axis, -1)).detach()
    y = y.clone(memory_format=torch.contiguous_format).requires_grad_()
    result = restore_layout(y, host, axis)
    assert torch.equal(result, host)
    dense = torch.empty_like(host)  # torch cannot keep the holes of a slice
    assert result.stride() in (host.stride(), dense.stride())
    weights = torch.randn_like(result)
    (result * weights).sum().backward()
    expected = weights if axis is None else weights.movedim(axis, -1)
    assert torch.equal(y.grad, expected)
