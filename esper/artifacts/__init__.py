"""Models at rest: saving, loading, and hardening into plain torch."""

from esper.artifacts.architecture import Architecture
from esper.artifacts.folder import ModelFolderError
from esper.artifacts.folder import check_target
from esper.artifacts.hardening import harden
from esper.artifacts.model import load
from esper.artifacts.model import load_into
from esper.artifacts.model import read_architecture
from esper.artifacts.model import save

__all__ = [
    "Architecture",
    "ModelFolderError",
    "check_target",
    "harden",
    "load",
    "load_into",
    "read_architecture",
    "save",
]
