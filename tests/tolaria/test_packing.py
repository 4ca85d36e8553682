"""Records come back as they were, and what is no data is refused by its place."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from esper.tolaria.packing import Opaque
from esper.tolaria.packing import Packed
from esper.tolaria.packing import PackingError
from esper.tolaria.packing import pack
from esper.tolaria.packing import unpack


@dataclass(frozen=True, slots=True)
class Inner:
    weights: dict[int, tuple[int, int]]
    total: tuple[Tensor | None, int]


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    loss: float
    data: bytes
    inner: list[Inner]
    alphas: Mapping[tuple[str, int], float]
    rest: Opaque
    note: str | None = None


RECORD = Outer(
    "a",
    math.inf,
    b"\x00\xff",
    [Inner({3: (1, 2)}, (torch.arange(3.0), 4)), Inner({}, (None, 0))],
    {("net.0", 1): 0.1},
    Opaque(
        {
            "betas": (0.9, 0.999),
            "milestones": Counter({3: 1}),
            "$": [None, True, -math.inf],
            "state": {0: {"step": torch.tensor(2.0)}},
        }
    ),
)


def _through_json(packed: Packed) -> Packed:
    return Packed(json.loads(json.dumps(packed.document, allow_nan=False)), packed.tensors)


def test_a_record_comes_back_as_it_was() -> None:
    again = unpack(Outer, _through_json(pack(RECORD, "r")), "r")
    assert torch.equal(again.inner[0].total[0], torch.arange(3.0))  # type: ignore[arg-type]
    assert again.inner[0].weights == {3: (1, 2)} and again.inner[1] == RECORD.inner[1]
    assert again.alphas == RECORD.alphas and (again.loss, again.data) == (math.inf, b"\x00\xff")
    found, wanted = again.rest.value, RECORD.rest.value
    assert isinstance(found, dict) and isinstance(wanted, dict)
    assert found.pop("state")[0]["step"] == 2.0
    assert found == {key: value for key, value in wanted.items() if key != "state"}
    assert type(found["milestones"]) is Counter and type(found["betas"]) is tuple


def test_what_is_no_data_is_refused_by_its_place() -> None:
    record = replace(RECORD, rest=Opaque({"lr_lambdas": [lambda step: 1.0]}))
    with pytest.raises(PackingError, match=r"r\.rest\.lr_lambdas\[0\] is a function"):
        pack(record, "r")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": None}, "name"),
        ({"more": 1}, "more"),
        ({"data": "text"}, "data"),
        ({"inner": [{"weights": {}, "total": [3, 4]}]}, "inner"),
        ({"rest": {"$": "call", "value": "x"}}, "no kind of value"),
        ({"rest": {"$": "tensor", "value": "elsewhere"}}, "elsewhere"),
    ],
)
def test_data_that_is_no_such_record_is_refused(change: dict[str, object], words: str) -> None:
    packed = _through_json(pack(RECORD, "r"))
    assert isinstance(packed.document, dict)
    document = {**packed.document, **change}
    if change == {"name": None}:
        del document["name"]
    with pytest.raises(PackingError, match=words):
        unpack(Outer, Packed(document, packed.tensors), "r")  # type: ignore[arg-type]
