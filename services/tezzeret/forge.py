"""The forge: check, lower, verify, store."""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Protocol

import torch

from esper.blueprints.checker import check
from esper.blueprints.digest import kernel_digest
from esper.blueprints.errors import BlueprintError
from esper.blueprints.lowering import Lowered
from esper.blueprints.lowering import lower_with_mapping
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import invalid
from esper.services.serving.errors import precondition
from esper.services.tezzeret.verify import verify
from esper.tezzeret.v1 import forge_pb2
from esper.urza.v1 import library_pb2

Emit = Callable[[forge_pb2.CompileEvent], None]

# The way of a blueprint while its first kernel is made.
_WAY = (
    library_pb2.BLUEPRINT_STATE_PROPOSED,
    library_pb2.BLUEPRINT_STATE_COMPILING,
    library_pb2.BLUEPRINT_STATE_VALIDATING,
    library_pb2.BLUEPRINT_STATE_CHARACTERIZED,
)
_PROVED = (library_pb2.KERNEL_STATE_VALIDATED, library_pb2.KERNEL_STATE_DEPLOYED)


class Library(Protocol):
    """What the forge asks of Urza; `esper.urza.client.UrzaClient` provides it."""

    def create_blueprint(self, blueprint: blueprint_pb2.Blueprint) -> library_pb2.BlueprintRecord:
        """Stores a blueprint, or finds an equal one stored."""

    def get_blueprint(self, name: str) -> library_pb2.BlueprintRecord:
        """Returns a stored blueprint."""

    def update_blueprint_state(
        self, name: str, state: library_pb2.BlueprintState
    ) -> library_pb2.BlueprintRecord:
        """Moves a blueprint to another state."""

    def create_kernel(
        self, kernel: kernel_pb2.Kernel, tags: Iterable[str] = ()
    ) -> library_pb2.KernelRecord:
        """Stores a kernel, or finds an equal one stored."""

    def update_kernel_state(
        self,
        name: str,
        state: library_pb2.KernelState,
        validation: kernel_pb2.ValidationReport | None = None,
    ) -> library_pb2.KernelRecord:
        """Moves a kernel to another state."""


class Forge:
    """Makes kernels out of blueprints and keeps them in a library.

    Args:
        library: Where blueprints and kernels are kept.
    """

    def __init__(self, library: Library) -> None:
        self._library = library

    def compile(
        self,
        blueprint: blueprint_pb2.Blueprint | str,
        signature: kernel_pb2.KernelSignature,
        tags: Iterable[str],
        emit: Emit,
    ) -> None:
        """Makes one kernel and emits an event after each stage; the last is STORED or FAILED.

        A kernel that the library holds with its verdict is not verified again. Nothing is stored
        of a blueprint that cannot be lowered.

        Args:
            blueprint: The blueprint, or the name of a stored one.
            signature: The place to compile for.
            tags: Stored with the kernel.
            emit: Takes the events.

        Raises:
            ServiceError: INVALID_ARGUMENT for a blueprint that is unsound or does not fit the
                place, FAILED_PRECONDITION for an archived blueprint or kernel and for a device
                class that this machine lacks.
        """
        record = None
        if isinstance(blueprint, str):
            record = self._library.get_blueprint(blueprint)
            blueprint = record.blueprint
        lowered = self._check_and_lower(blueprint, signature, emit)
        record = record or self._library.create_blueprint(blueprint)
        if record.state == library_pb2.BLUEPRINT_STATE_ARCHIVED:
            raise precondition("ARCHIVED", f"{record.name} is archived", name=record.name)
        record = self._bring(record, library_pb2.BLUEPRINT_STATE_VALIDATING)
        stored = self._library.create_kernel(lowered.kernel, tags)
        assert stored.name == f"kernels/{kernel_digest(lowered.kernel)}"
        if stored.state == library_pb2.KERNEL_STATE_TESTING:
            stored = self._prove(lowered, stored, emit)
        if stored.state == library_pb2.KERNEL_STATE_DEPRECATED:
            raise precondition("ARCHIVED", f"{stored.name} is archived", name=stored.name)
        if stored.state in _PROVED:
            self._bring(record, library_pb2.BLUEPRINT_STATE_CHARACTERIZED)
            emit(
                forge_pb2.CompileEvent(
                    stage=forge_pb2.COMPILE_STAGE_STORED,
                    detail=f"{stored.name} is in the library",
                    validation=stored.validation,
                    kernel=stored,
                )
            )
            return
        if record.state == library_pb2.BLUEPRINT_STATE_VALIDATING:
            self._library.update_blueprint_state(record.name, library_pb2.BLUEPRINT_STATE_FAILED)
        emit(
            forge_pb2.CompileEvent(
                stage=forge_pb2.COMPILE_STAGE_FAILED,
                detail=f"{stored.name} was refused: {stored.validation.detail}",
                validation=stored.validation,
            )
        )

    def _check_and_lower(
        self,
        blueprint: blueprint_pb2.Blueprint,
        signature: kernel_pb2.KernelSignature,
        emit: Emit,
    ) -> Lowered:
        try:
            checked = check(blueprint)
            emit(
                forge_pb2.CompileEvent(
                    stage=forge_pb2.COMPILE_STAGE_CHECKED,
                    detail=f"{blueprint.name}: {len(checked.graph.nodes)} node(s), sound",
                )
            )
            lowered = lower_with_mapping(blueprint, signature)
        except BlueprintError as error:
            raise _refused(error) from error
        if signature.device_class == kernel_pb2.DEVICE_CLASS_CUDA and not torch.cuda.is_available():
            raise precondition("NO_DEVICE", "a CUDA kernel can be proved on a CUDA machine only")
        kernel = lowered.kernel
        emit(
            forge_pb2.CompileEvent(
                stage=forge_pb2.COMPILE_STAGE_LOWERED,
                detail=f"{kernel.WhichOneof('lowering')} with {kernel.parameter_count} parameters "
                f"and {kernel.flops_per_token} FLOPs per token",
            )
        )
        return lowered

    def _prove(
        self, lowered: Lowered, stored: library_pb2.KernelRecord, emit: Emit
    ) -> library_pb2.KernelRecord:
        validation = verify(lowered)
        if not validation.passed:
            return self._library.update_kernel_state(
                stored.name, library_pb2.KERNEL_STATE_INVALID, validation
            )
        emit(
            forge_pb2.CompileEvent(
                stage=forge_pb2.COMPILE_STAGE_VERIFIED,
                detail=validation.detail,
                validation=validation,
            )
        )
        return self._library.update_kernel_state(
            stored.name, library_pb2.KERNEL_STATE_VALIDATED, validation
        )

    def _bring(
        self, record: library_pb2.BlueprintRecord, state: library_pb2.BlueprintState
    ) -> library_pb2.BlueprintRecord:
        """Moves a blueprint on its way up to `state`; one that is further stays."""
        if record.state == library_pb2.BLUEPRINT_STATE_FAILED:
            compiling = library_pb2.BLUEPRINT_STATE_COMPILING
            record = self._library.update_blueprint_state(record.name, compiling)
        if record.state in _WAY:
            for step in _WAY[_WAY.index(record.state) + 1 : _WAY.index(state) + 1]:
                record = self._library.update_blueprint_state(record.name, step)
        return record


def _refused(error: BlueprintError) -> ServiceError:
    """Returns INVALID_ARGUMENT with the field as the request names it."""
    field = error.field
    if not field.startswith(("signature", "kernel")):
        field = f"inline.{field}"
    return invalid(field, error.value, error.rule)
