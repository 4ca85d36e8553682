"""The methods that a server has, by their full names."""

from collections.abc import Mapping
from typing import TypeAlias
from typing import TypeVar
from typing import cast

import grpc

Q = TypeVar("Q")
R = TypeVar("R")

# Quoted: gRPC's class is generic in its type stubs alone.
_Handler: TypeAlias = "grpc.RpcMethodHandler[object, object]"


class MethodTable(grpc.GenericRpcHandler):
    """Where services register their methods: to a server of gRPC it is one handler for all.

    `grpc.aio` keeps a task for every method that is registered with it by name, and with every call
    it begins and ends a wait for all of them: with the fifty of a plane that took a tenth of a
    small call. It does not wait for those that a handler finds for it.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, _Handler] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Does nothing: what generated code adds here it registers by name, too."""

    def add_registered_method_handlers(
        self, service: str, handlers: "Mapping[str, grpc.RpcMethodHandler[Q, R]]"
    ) -> None:
        """Registers methods of a service by name; a later handler takes the place of an earlier."""
        for name, handler in handlers.items():
            self._handlers[f"/{service}/{name}"] = cast("_Handler", handler)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "_Handler | None":
        """Returns the handler of the method that is called; None for one that nobody serves."""
        return self._handlers.get(handler_call_details.method)
