"""Esper lets a PyTorch model grow while it trains.

The names of the public interface, the native core and torch are loaded on first use: ``import
esper`` only looks whether the core fits the torch that is installed. It starts no thread, process
or channel.
"""

from importlib import import_module

from esper import _build
from esper._build import BuildInfo
from esper._build import build_info

__version__ = "0.1.0"

_HOMES = {
    "EsperConfig": "esper.config",
    "KasminaLayer": "esper.kasmina",
    "MorphableModel": "esper.kasmina",
    "SeedLifecycleState": "esper.kasmina",
    "harden": "esper.artifacts",
    "load": "esper.artifacts",
    "save": "esper.artifacts",
    "session": "esper.tolaria",
    "unwrap": "esper.kasmina",
    "wrap": "esper.kasmina",
}

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

_build.check()


def __getattr__(name: str) -> object:
    if name == "_C":  # `from esper import _C` comes here first
        _build.load()
        return import_module("esper._C")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
