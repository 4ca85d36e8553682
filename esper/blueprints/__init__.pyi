from esper.blueprints.checker import check
from esper.blueprints.digest import blueprint_digest
from esper.blueprints.digest import kernel_digest
from esper.blueprints.errors import BlueprintError
from esper.blueprints.init import init_parameters
from esper.blueprints.init import weights_from_bytes
from esper.blueprints.init import weights_to_bytes
from esper.blueprints.interpreter import ReferenceModule
from esper.blueprints.interpreter import reference_from_blueprint
from esper.blueprints.interpreter import reference_module
from esper.blueprints.kernels import check_kernel
from esper.blueprints.library import get
from esper.blueprints.library import names
from esper.blueprints.lowering import lower

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
