"""Esper lets a PyTorch model grow while it trains."""

from esper import _build
from esper._build import BuildInfo
from esper._build import build_info

__version__ = "0.1.0"
__all__ = ["BuildInfo", "__version__", "build_info"]

_build.load()
