"""Client of Tamiyo's ControllerService."""

from collections.abc import Iterable
from collections.abc import Iterator

import grpc

from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import readable_errors
from esper.tamiyo.v1 import controller_pb2
from esper.tamiyo.v1 import controller_pb2_grpc


class TamiyoClient:
    """Asks the controller for decisions.

    Args:
        channel: An open channel to a server of ``esper.tamiyo.v1.ControllerService``.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = controller_pb2_grpc.ControllerServiceStub(channel)

    def advise(
        self, observations: Iterable[controller_pb2.Observation], memory: bytes = b""
    ) -> Iterator[controller_pb2.AdviseResponse]:
        """Streams observations and yields exactly one response for each, in order.

        Args:
            observations: Read as they come, from a thread of the channel; the stream ends with
                them.
            memory: That of the last response to the run, where it came on a stream that has ended.

        Raises:
            RpcError: If the stream breaks.
        """
        requests = (
            controller_pb2.AdviseRequest(observation=observation, memory=b"" if number else memory)
            for number, observation in enumerate(observations)
        )
        with readable_errors():
            yield from self._stub.Advise(requests)

    def list_policies(self, timeout_s: float = CALL_TIMEOUT_S) -> list[controller_pb2.Policy]:
        """Returns the policies that the server can run.

        Raises:
            RpcError: If the call fails.
        """
        with readable_errors():
            response = self._stub.ListPolicies(
                controller_pb2.ListPoliciesRequest(), timeout=timeout_s
            )
        return list(response.policies)
