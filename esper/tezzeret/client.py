"""Client of Tezzeret: asks for kernels."""

from collections.abc import Iterable
from collections.abc import Iterator

import grpc

from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import RpcError
from esper.common.rpc import readable_errors
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.tezzeret.v1 import forge_pb2
from esper.tezzeret.v1 import forge_pb2_grpc
from esper.urza.v1 import library_pb2

COMPILE_TIMEOUT_S = 120.0
"""Deadline of a compilation, the time in the server's queue included."""


class CompileError(RuntimeError):
    """A blueprint cannot be compiled for a place, or its kernel failed its verification.

    Attributes:
        validation: The evidence against the kernel; None where none was made.
    """

    def __init__(self, message: str, validation: kernel_pb2.ValidationReport | None = None) -> None:
        super().__init__(message)
        self.validation = validation


class TezzeretClient:
    """Compiles blueprints; safe to use from several threads.

    Every call raises `esper.common.rpc.RpcError` where the server does not answer or refuses the
    call for another reason than the blueprint.

    Args:
        channel: An open channel to a server of `esper.tezzeret.v1.ForgeService`.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = forge_pb2_grpc.ForgeServiceStub(channel)

    def compile_events(
        self,
        blueprint: blueprint_pb2.Blueprint | str,
        signature: kernel_pb2.KernelSignature,
        tags: Iterable[str] = (),
        timeout_s: float = COMPILE_TIMEOUT_S,
    ) -> Iterator[forge_pb2.CompileEvent]:
        """Compiles a blueprint and yields what happens, as it happens.

        Args:
            blueprint: The blueprint, or the name `blueprints/{digest}` of a stored one.
            signature: The place to compile for.
            tags: Stored with the kernel.
            timeout_s: Deadline, in seconds.

        Yields:
            CHECKED, LOWERED, VERIFIED (not for a kernel that the library holds already), and
            STORED with the kernel's record or FAILED.

        Raises:
            CompileError: Where the blueprint is unsound or does not fit the place.
        """
        request = forge_pb2.CompileRequest(signature=signature, tags=tags)
        if isinstance(blueprint, str):
            request.name = blueprint
        else:
            request.inline.CopyFrom(blueprint)
        try:
            with readable_errors():
                for response in self._stub.Compile(request, timeout=timeout_s):
                    yield response.event
        except RpcError as error:
            if error.code is grpc.StatusCode.INVALID_ARGUMENT:
                raise CompileError(error.message) from error
            raise

    def compile(
        self,
        blueprint: blueprint_pb2.Blueprint | str,
        signature: kernel_pb2.KernelSignature,
        tags: Iterable[str] = (),
        timeout_s: float = COMPILE_TIMEOUT_S,
    ) -> library_pb2.KernelRecord:
        """Compiles a blueprint and returns the record of the proved kernel.

        Args:
            blueprint: The blueprint, or the name `blueprints/{digest}` of a stored one.
            signature: The place to compile for.
            tags: Stored with the kernel.
            timeout_s: Deadline, in seconds.

        Raises:
            CompileError: Where the blueprint is unsound or does not fit the place, or its kernel
                failed its verification.
        """
        event = None
        for event in self.compile_events(blueprint, signature, tags, timeout_s):
            if event.stage == forge_pb2.COMPILE_STAGE_FAILED:
                raise CompileError(event.detail, event.validation)
        if event is None or not event.HasField("kernel"):
            raise CompileError("the server ended the compilation without a kernel")
        return event.kernel

    def list_pipelines(self) -> list[forge_pb2.Pipeline]:
        """Returns the ways in which the server can lower a blueprint, in the order of trying."""
        request = forge_pb2.ListPipelinesRequest()
        with readable_errors():
            answer = self._stub.ListPipelines(request, timeout=CALL_TIMEOUT_S)
        return list(answer.pipelines)
