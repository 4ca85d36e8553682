"""What the policy remembers of a run, as bytes that the client keeps.

So the service holds no state between two streams: a stream that is lost, a server that is replaced
or a run that goes on from a checkpoint loses nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import get_args
from typing import get_origin

import cattrs

from esper.services.tamiyo.heuristic import RunState

MAX_MEMORY_BYTES = 2**20
"""Longest memory that is read."""


def _has_tuple_keys(kind: object) -> bool:
    key = get_args(kind)[0] if get_origin(kind) in (dict, Mapping) else None
    return get_origin(key) is tuple


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)

    def mapping(items: list[tuple[object, object]], kind: object) -> dict[object, object]:
        of_keys, of_values = get_args(kind)
        return {
            converter.structure(key, of_keys): converter.structure(value, of_values)
            for key, value in items
        }

    # JSON has no tuples for keys: such a mapping is a list of its items.
    converter.register_structure_hook_func(_has_tuple_keys, mapping)
    converter.register_unstructure_hook_func(
        _has_tuple_keys, lambda value: [list(item) for item in value.items()]
    )
    return converter


_CONVERTER = _converter()


def to_bytes(state: RunState, policy: str) -> bytes:
    """Returns a run's memory, the host's graph apart: the client sends it with a new stream.

    Args:
        state: What the policy remembers.
        policy: Digest of the policy.
    """
    body = _CONVERTER.unstructure(replace(state, graph=None))
    del body["graph"]
    return json.dumps({"policy": policy, "run": body}, separators=(",", ":")).encode()


def from_bytes(data: bytes, policy: str) -> RunState:
    """Returns what `to_bytes` was given.

    Raises:
        ValueError: If the bytes are no memory, or that of another policy.
    """
    try:
        whole = json.loads(data)
        if whole["policy"] != policy:
            raise ValueError(f"must be that of the policy in force, {policy}")
        return _CONVERTER.structure({**whole["run"], "graph": None}, RunState)
    except (KeyError, TypeError, cattrs.BaseValidationError, json.JSONDecodeError) as error:
        raise ValueError("must be what this policy gave out") from error
