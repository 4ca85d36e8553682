"""Fixtures of the training side: a small task, and one embedded plane for the whole module."""

from collections.abc import Iterator

import pytest

from esper.plane import EmbeddedPlane


@pytest.fixture(scope="module")
def plane() -> Iterator[str]:
    """Address of a running plane."""
    with EmbeddedPlane() as embedded:
        yield embedded.address
