"""Finding, starting and talking to planes."""

from esper.plane.connection import Plane
from esper.plane.connection import connect
from esper.plane.contract import contract_digest
from esper.plane.embedded import EmbeddedPlane
from esper.plane.errors import PlaneError

__all__ = ["EmbeddedPlane", "Plane", "PlaneError", "connect", "contract_digest"]
