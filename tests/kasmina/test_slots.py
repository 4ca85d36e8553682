import copy

import pytest
import torch
from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper.kasmina import wrap
from esper.kasmina.slots import encode


@example(["a.b", "a/b", "a_b", "a~1b", "a~b", "a~0b"])
@given(st.lists(st.text("ab./_~01"), unique=True, max_size=6))
def test_different_names_stay_different_and_lose_their_dots(names):
    encoded = [encode(name) for name in names]
    assert len(set(encoded)) == len(names)
    assert not any("." in name for name in encoded)


def host_of(*names):
    """Modules under names that collide once dots are replaced."""
    host = nn.Module()
    for name in names:
        parent = host
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, nn.Linear(4, 4))
    return host


# The last four are attributes of modules or mappings, or look like an encoded one.
NAMES = ("a.b", "a/b", "a_b", "a~1b", "keys", "_keys", "values~", "get")


def test_colliding_names_are_slots_of_their_own():
    model = wrap(host_of(*NAMES))
    assert sorted(model.slots) == sorted(NAMES)
    for name in NAMES:
        model.germinate(name, 0, "affine")
    keys = [key for key in model.state_dict() if key.startswith("slots.")]
    assert len(keys) == len(set(keys)) == 2 * len(NAMES)
    for name in NAMES:
        assert model.slots[name].name == name
    other = wrap(host_of(*NAMES))
    for name in NAMES:
        other.germinate(name, 0, "affine")
        nn.init.ones_(model.seed_parameters(name, 0)[0])
    other.load_state_dict(model.state_dict())
    assert all(bool((other.seed_parameters(name, 0)[0] == 1).all()) for name in NAMES)


def test_the_table_is_a_mapping_and_a_module():
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    slots = model.slots
    assert list(slots.keys()) == ["0", "1"] and len(slots) == 2
    assert [layer.name for layer in slots.values()] == ["0", "1"]
    assert "0" in slots and "7" not in slots and slots.get("7") is None
    with pytest.raises(KeyError):
        slots["7"]
    twin = copy.deepcopy(model).slots
    assert twin != slots and len({twin, slots}) == 2
    assert twin["0"].module is not slots["0"].module
    assert torch.is_tensor(next(model.parameters()))
