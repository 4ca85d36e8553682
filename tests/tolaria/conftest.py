"""Fixtures of the training side: a small task, and one embedded plane for the whole module."""

from collections.abc import Iterator

import pytest
from tolaria import governed

from esper.plane import EmbeddedPlane


@pytest.fixture(scope="module")
def plane() -> Iterator[str]:
    """Address of a running plane."""
    with EmbeddedPlane() as embedded:
        yield embedded.address


@pytest.fixture(scope="module")
def governed_plane(plane: str) -> Iterator[None]:
    """Lets every governed loop of the module find the plane."""
    governed.PLANE.append(plane)
    yield
    governed.PLANE.clear()
