"""Soundness and digests of blueprints and kernels, by the checkers of `esper.blueprints`."""

from esper.blueprints.digest import blueprint_digest
from esper.blueprints.digest import kernel_digest
from esper.blueprints.errors import BlueprintError
from esper.blueprints.kernels import check_kernel
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import invalid


def digest_of_blueprint(blueprint: blueprint_pb2.Blueprint) -> str:
    """Returns the digest of a sound blueprint.

    Raises:
        ServiceError: INVALID_ARGUMENT with the field, its value and the rule.
    """
    try:
        return blueprint_digest(blueprint)
    except BlueprintError as error:
        raise _refused("blueprint", error) from error


def digest_of_kernel(kernel: kernel_pb2.Kernel) -> str:
    """Returns the digest of a sound kernel.

    Raises:
        ServiceError: INVALID_ARGUMENT with the field, its value and the rule.
    """
    try:
        check_kernel(kernel)
        return kernel_digest(kernel)
    except BlueprintError as error:
        raise _refused("kernel", error) from error


def _refused(resource: str, error: BlueprintError) -> ServiceError:
    field = error.field
    if field != resource and not field.startswith(f"{resource}."):
        field = f"{resource}.{field}"
    return invalid(field, error.value, error.rule)
