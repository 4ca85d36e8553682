"""Tamiyo's gRPC face: a thin adapter over the policy."""

import asyncio
import threading
from collections.abc import AsyncIterator
from collections.abc import Iterable

import grpc

from esper.common.v1 import kernel_pb2
from esper.plane import Plane
from esper.plane import connect
from esper.services.serving.context import CallContext
from esper.services.serving.context import ServiceContext
from esper.services.serving.errors import invalid
from esper.services.serving.errors import not_found
from esper.services.serving.errors import unavailable
from esper.services.serving.errors import unimplemented
from esper.services.tamiyo.heuristic import Heuristic
from esper.services.tamiyo.heuristic import RunState
from esper.services.tamiyo.memory import MAX_MEMORY_BYTES
from esper.services.tamiyo.memory import from_bytes
from esper.services.tamiyo.memory import to_bytes
from esper.tamiyo.v1 import controller_pb2
from esper.tamiyo.v1 import controller_pb2_grpc
from esper.tolaria import recipe
from esper.urza.v1 import library_pb2

_USABLE = (library_pb2.KERNEL_STATE_VALIDATED, library_pb2.KERNEL_STATE_DEPLOYED)
_MAX_GRAPH_NODES = 100_000


class _Library:
    """The kernels of Urza, asked over the wire; the connection is made with the first question."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._plane: Plane | None = None
        self._lock = threading.Lock()

    def __call__(self, signature: kernel_pb2.KernelSignature) -> Iterable[library_pb2.KernelRecord]:
        with self._lock:
            if self._plane is None:
                self._plane = connect(self._address)
        wanted = library_pb2.KernelFilter(
            slot_kind=signature.slot_kind,
            chunk_width=signature.chunk_width,
            source_width=signature.source_width,
            source=signature.source,
            dtype=signature.dtype,
            device_class=signature.device_class,
        )
        return [r for r in self._plane.urza.list_kernels(wanted) if r.state in _USABLE]

    def close(self) -> None:
        if self._plane is not None:
            self._plane.close()


def check_observation(observation: controller_pb2.Observation, state: RunState) -> None:
    """Refuses an observation that no policy could judge.

    Raises:
        ServiceError: INVALID_ARGUMENT with the field, the value and the rule.
    """
    if not observation.run:
        raise invalid("observation.run", "", "must name the run")
    if observation.num_epochs < 1:
        raise invalid("observation.num_epochs", observation.num_epochs, "must be at least 1")
    if not 0 <= observation.epoch < observation.num_epochs:
        raise invalid(
            "observation.epoch",
            observation.epoch,
            f"must be at least 0 and below num_epochs, {observation.num_epochs}",
        )
    if observation.HasField("recipe"):
        try:
            recipe.from_proto(observation.recipe)
        except ValueError as error:
            raise invalid("observation.recipe", "", str(error)) from error
    if observation.HasField("host_graph"):
        if len(observation.host_graph.nodes) > _MAX_GRAPH_NODES:
            raise invalid(
                "observation.host_graph.nodes",
                len(observation.host_graph.nodes),
                f"must be at most {_MAX_GRAPH_NODES} nodes",
            )
        digest = observation.host_graph.digest
    else:
        digest = state.graph.digest if state.graph is not None else ""
    if observation.host_graph_digest != digest:
        raise invalid(
            "observation.host_graph_digest",
            observation.host_graph_digest,
            f"must be the digest of the graph last sent, {digest!r}",
        )


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    """Serves ``esper.tamiyo.v1.ControllerService``.

    Args:
        policy: The policy in force.
        stopping: Set when the server drains; streams of advice end then.
    """

    def __init__(self, policy: Heuristic, stopping: asyncio.Event) -> None:
        self._policy = policy
        self._stopping = stopping

    async def Advise(
        self,
        request_iterator: AsyncIterator[controller_pb2.AdviseRequest],
        context: CallContext,
    ) -> AsyncIterator[controller_pb2.AdviseResponse]:
        """Answers every observation of the stream with one response."""
        state: RunState | None = None
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while True:
                arrival = asyncio.ensure_future(anext(request_iterator, None))
                await asyncio.wait((arrival, stopping), return_when=asyncio.FIRST_COMPLETED)
                if not arrival.done():  # a stream between two epochs must not hold the drain
                    arrival.cancel()
                    raise unavailable("the server is stopping")
                request = arrival.result()
                if request is None:
                    return
                observation = request.observation
                if state is None:
                    state = self._recall(request.memory)
                check_observation(observation, state)
                decisions = await asyncio.to_thread(self._policy.decide, observation, state)
                yield controller_pb2.AdviseResponse(
                    run=observation.run,
                    epoch=observation.epoch,
                    decisions=decisions,
                    memory=to_bytes(state, self._policy.digest),
                )
        finally:
            stopping.cancel()

    async def ListPolicies(
        self, request: controller_pb2.ListPoliciesRequest, context: CallContext
    ) -> controller_pb2.ListPoliciesResponse:
        """Returns the one policy that this server runs."""
        return controller_pb2.ListPoliciesResponse(policies=[self._describe()])

    async def GetPolicy(
        self, request: controller_pb2.GetPolicyRequest, context: CallContext
    ) -> controller_pb2.GetPolicyResponse:
        """Returns a policy by name."""
        policy = self._describe()
        if request.name != policy.name:
            raise not_found(request.name)
        return controller_pb2.GetPolicyResponse(policy=policy)

    async def ExplainDecision(
        self, request: controller_pb2.ExplainDecisionRequest, context: CallContext
    ) -> controller_pb2.ExplainDecisionResponse:
        """Not served yet."""
        raise unimplemented("esper.tamiyo.v1.ControllerService/ExplainDecision")

    async def ReportOutcomes(
        self,
        request_iterator: AsyncIterator[controller_pb2.ReportOutcomesRequest],
        context: CallContext,
    ) -> controller_pb2.ReportOutcomesResponse:
        """Not served yet."""
        raise unimplemented("esper.tamiyo.v1.ControllerService/ReportOutcomes")

    async def ActivatePolicy(
        self, request: controller_pb2.ActivatePolicyRequest, context: CallContext
    ) -> controller_pb2.ActivatePolicyResponse:
        """Not served yet."""
        raise unimplemented("esper.tamiyo.v1.ControllerService/ActivatePolicy")

    def TrainPolicy(
        self, request: controller_pb2.TrainPolicyRequest, context: CallContext
    ) -> AsyncIterator[controller_pb2.TrainPolicyResponse]:
        """Not served yet."""
        raise unimplemented("esper.tamiyo.v1.ControllerService/TrainPolicy")

    def _recall(self, memory: bytes) -> RunState:
        """Returns what the policy remembers of a run whose stream has ended."""
        if not memory:
            return RunState()
        if len(memory) > MAX_MEMORY_BYTES:
            raise invalid("memory", f"{len(memory)} bytes", f"must be at most {MAX_MEMORY_BYTES}")
        try:
            return from_bytes(memory, self._policy.digest)
        except ValueError as error:
            raise invalid("memory", f"{len(memory)} bytes", str(error)) from error

    def _describe(self) -> controller_pb2.Policy:
        return controller_pb2.Policy(
            name=f"policies/{self._policy.digest}",
            title=self._policy.title,
            description=self._policy.description,
            active=True,
        )


class TamiyoService:
    """The controller as a service of the shell."""

    full_names = ("esper.tamiyo.v1.ControllerService",)

    def __init__(self, context: ServiceContext) -> None:
        assert context.urza is not None, "the shell fills in where Urza is"
        self._library = _Library(context.urza)
        self._servicer = ControllerServicer(Heuristic(self._library), context.stopping)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the servicer."""
        controller_pb2_grpc.add_ControllerServiceServicer_to_server(self._servicer, server)

    async def close(self) -> None:
        """Lets go of the library."""
        await asyncio.to_thread(self._library.close)


def create(context: ServiceContext) -> TamiyoService:
    """Returns the service."""
    return TamiyoService(context)
