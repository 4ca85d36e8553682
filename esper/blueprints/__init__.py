"""Blueprints: architectures as data, their checker, digests, lowering and reference interpreter.

What needs torch is loaded on first use, so that a service which only stores blueprints does not
need it.
"""

from importlib import import_module

from esper.blueprints.checker import check
from esper.blueprints.digest import blueprint_digest
from esper.blueprints.digest import kernel_digest
from esper.blueprints.errors import BlueprintError
from esper.blueprints.kernels import check_kernel
from esper.blueprints.library import get
from esper.blueprints.library import names
from esper.blueprints.lowering import lower

_NEEDS_TORCH = {
    "ReferenceModule": "esper.blueprints.interpreter",
    "init_parameters": "esper.blueprints.init",
    "reference_from_blueprint": "esper.blueprints.interpreter",
    "reference_module": "esper.blueprints.interpreter",
    "weights_from_bytes": "esper.blueprints.init",
    "weights_to_bytes": "esper.blueprints.init",
}

__all__ = [
    "BlueprintError",
    "ReferenceModule",
    "blueprint_digest",
    "check",
    "check_kernel",
    "get",
    "init_parameters",
    "kernel_digest",
    "lower",
    "names",
    "reference_from_blueprint",
    "reference_module",
    "weights_from_bytes",
    "weights_to_bytes",
]


def __getattr__(name: str) -> object:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NEEDS_TORCH[name]), name)
