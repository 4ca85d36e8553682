from esper._build import BuildInfo
from esper._build import build_info
from esper.artifacts import harden
from esper.artifacts import load
from esper.artifacts import save
from esper.config import EsperConfig
from esper.kasmina import KasminaLayer
from esper.kasmina import MorphableModel
from esper.kasmina import SeedLifecycleState
from esper.kasmina import unwrap
from esper.kasmina import wrap
from esper.tolaria import session

__version__: str
__all__ = [
    "BuildInfo",
    "EsperConfig",
    "KasminaLayer",
    "MorphableModel",
    "SeedLifecycleState",
    "__version__",
    "build_info",
    "harden",
    "load",
    "save",
    "session",
    "unwrap",
    "wrap",
]
