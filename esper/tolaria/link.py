"""The background thread that talks to the plane, so that training never waits for it.

One thread owns the channel. The training thread posts work (observations, events, reports) and
takes what has arrived. Any failure of the plane ends the link with one warning; the run goes on
without new growth. A patient link first waits for the plane to come back, and then tells it
whatever it needs to go on: everything that is sent may be sent twice without a second effect.
"""

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from functools import partial

import grpc
from google.protobuf.message import Message
from torch import Tensor

from esper import blueprints
from esper.blueprints.digest import kernel_digest
from esper.blueprints.init import weights_from_bytes
from esper.common.rpc import RpcError
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import signal_pb2
from esper.config import Candidate
from esper.plane import EmbeddedPlane
from esper.plane import Plane
from esper.plane import PlaneError
from esper.plane import connect
from esper.plane.address import parse_address
from esper.plane.connection import SERVICES
from esper.plane.embedded import STOP_TIMEOUT_S
from esper.tamiyo.v1 import controller_pb2
from esper.tezzeret.client import CompileError
from esper.tolaria.recording import RunRecorder
from esper.urza.v1 import library_pb2

_log = logging.getLogger("esper")

Address = str | Mapping[str, str]

# The plane is there and says no to one request; every other code says that it is gone or broken.
_REFUSALS = frozenset(
    {
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)

# It may come back from these; everything else will be the same next time.
_LOST = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
    }
)
_RETRY_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Advice:
    """A decision with everything that is needed to apply it.

    Attributes:
        decision: What Tamiyo asks for.
        kernel: The kernel of a GERMINATE decision, its digest verified; otherwise ``None``.
        weights: The kernel's weights, where it carries any.
    """

    decision: controller_pb2.Decision
    kernel: kernel_pb2.Kernel | None = None
    weights: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class LinkState:
    """What a link must know to go on where another ended.

    Attributes:
        memory: What the policy remembers of the run.
        pending: Advice that had arrived and was not taken.
        records: The run's history as told to Urza, each event as a serialized Any.
    """

    memory: bytes = b""
    pending: Sequence[Advice] = ()
    records: Sequence[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Work:
    """One thing for the link's thread to do.

    Attributes:
        run: Does it.
        outlives_run: Whether it is still done when the run has ended.
        vital: Whether the link ends where the plane refuses it; a stream that was refused is over.
    """

    run: Callable[[Plane], None]
    outlives_run: bool
    vital: bool


def check_plane(plane: Address | None) -> None:
    """Refuses an address that makes no sense, before anything is started.

    Raises:
        ValueError: If an address is malformed, or a mapping does not name every service.
    """
    if plane is None:
        return
    if not isinstance(plane, str) and plane.keys() != set(SERVICES):
        raise ValueError(f"plane names {sorted(plane)}, but it must name {', '.join(SERVICES)}")
    for address in (plane,) if isinstance(plane, str) else plane.values():
        parse_address(address)


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Refuses candidates that no kernel could be compiled of.

    Raises:
        ValueError: If a blueprint does not exist or does not take its ranks or hyperparameters.
    """
    for candidate in candidates:
        for rank in _ranks(candidate):
            _blueprint(candidate, rank)


class PlaneLink:
    """Connection of one session to the plane.

    Args:
        plane: Address of a plane (or one per service), or ``None`` to start an embedded one.
        candidates: Blueprints for which kernels are compiled.
        run: Id of the run.
        patience_s: How long to wait for a plane that is away.
        state: Where another link of the run ended.
    """

    def __init__(
        self,
        plane: Address | None,
        candidates: Sequence[Candidate],
        run: str,
        *,
        patience_s: float = 0.0,
        state: LinkState | None = None,
    ) -> None:
        state = state if state is not None else LinkState()
        self._address = plane
        self._candidates = tuple(candidates)
        self._run_id = run
        self._patience_s = patience_s
        self._away_since_s: float | None = None
        self._memory = state.memory
        self._recorder = RunRecorder(run, state.records)
        self._unfinished: _Work | None = None  # what was done when the plane went away
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._closing = False
        self._asked = False
        self._observations: queue.SimpleQueue[controller_pb2.Observation | None]
        self._responses: Iterator[controller_pb2.AdviseResponse] | None = None
        self._graph: signal_pb2.HostGraph | None = None
        self._plane: Plane | None = None
        self._compiled: dict[bytes, kernel_pb2.KernelSignature] = {}
        self._kernels: dict[str, None] = {}  # names of what was compiled for this run
        self._deployed: set[str] = set()
        self._arrived = threading.Condition()
        self._advice: list[Advice] = list(state.pending)
        self._answered_epoch = -1
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="esper-plane-link", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why the plane is gone, or ``None`` while it is there."""
        return self._failure

    def compile(self, signatures: Sequence[kernel_pb2.KernelSignature]) -> None:
        """Asks Tezzeret for a kernel of every candidate for every place not yet served."""
        for signature in signatures:
            place = signature.SerializeToString(deterministic=True)
            if place in self._compiled:  # seeds of equal chunks share their kernels
                continue
            self._compiled[place] = signature
            self._post(partial(self._compile, signature))

    def observe(self, observation: controller_pb2.Observation) -> None:
        """Sends an observation; the advice arrives later."""
        self._asked = True
        self._post(lambda plane: self._advise(plane, observation), vital=True)

    def publish(self, topic: str, message: Message) -> None:
        """Appends an event to a topic of Oona, under the run's key."""
        request_id = _request_id(message, len(self._recorder))

        def publish(plane: Plane) -> None:
            plane.oona.publish(topic, message, key=self._run_id, request_id=request_id)

        self._post(publish, outlives_run=True)

    def record(self, message: Message) -> None:
        """Appends an event to the run's hash-chained history, which is opened with the first."""
        self._recorder.add(message)
        self._post(lambda plane: self._recorder.flush(plane.urza.runs), outlives_run=True)

    def report(self, report: library_pb2.FieldReport) -> None:
        """Tells Urza what became of a kernel."""
        request_id = _request_id(report, len(self._recorder))

        def record(plane: Plane) -> None:
            plane.urza.record_field_report(report, request_id)

        self._post(record, outlives_run=True)

    def mark_deployed(self, kernel_name: str) -> None:
        """Tells Urza that a kernel is at work in a model."""

        def deploy(plane: Plane) -> None:
            record = plane.urza.get_kernel(kernel_name)
            if record.state == library_pb2.KERNEL_STATE_VALIDATED:
                plane.urza.update_kernel_state(kernel_name, library_pb2.KERNEL_STATE_DEPLOYED)

        if kernel_name not in self._deployed:
            self._deployed.add(kernel_name)
            self._post(deploy, outlives_run=True)

    def take(self) -> list[Advice]:
        """Returns the advice that has arrived since the last call; never waits."""
        with self._arrived:
            advice, self._advice = self._advice, []
            return advice

    def wait(self, epoch: int, timeout_s: float) -> list[Advice]:
        """Waits until the observation of ``epoch`` is answered, then returns all advice.

        A plane that is slower than ``timeout_s`` counts as dead.
        """
        with self._arrived:
            answered = self._arrived.wait_for(
                lambda: self._answered_epoch >= epoch or self._failure is not None, timeout_s
            )
        if not answered:
            self._fail(f"it did not answer within {timeout_s:g} s")
        return self.take()

    def state(self) -> LinkState:
        """Returns what another link needs to go on from here."""
        with self._arrived:
            return LinkState(self._memory, tuple(self._advice), self._recorder.messages)

    def close(self, timeout_s: float = 10.0) -> None:
        """Sends the events and reports that are left and ends the thread (and embedded plane).

        Args:
            timeout_s: How long to wait for the plane to take them; then they are given up.
        """
        if self._failure is None and self._asked and self._answered_epoch < 0:
            _log.warning(
                "esper: the run ended before the plane's first advice, so nothing could grow; "
                "use mode='lockstep' for short runs"
            )
        self._closing = True
        self._work.put(None)
        self._thread.join(timeout_s if self._failure is None else 0.0)
        if self._thread.is_alive() and self._plane is not None:
            self._fail(f"it did not take the last reports within {timeout_s:g} s")
            self._plane.close()  # ends the call that the thread hangs in
            self._thread.join(STOP_TIMEOUT_S + 1.0)

    def _post(
        self, run: Callable[[Plane], None], *, outlives_run: bool = False, vital: bool = False
    ) -> None:
        if self._failure is None:
            self._work.put(_Work(run, outlives_run, vital))

    def _fail(self, why: str) -> None:
        with self._arrived:
            if self._failure is None:
                self._failure = why
                _log.warning(
                    "esper: the plane is gone (%s); training goes on without new growth", why
                )
            self._arrived.notify_all()

    def _run(self) -> None:
        try:
            while not self._serve_one_connection():
                time.sleep(_RETRY_PAUSE_S)
        except (PlaneError, RpcError) as error:
            self._fail(str(error))
        except Exception as error:  # a bug of ours must not hang or end the user's run either
            _log.exception("esper: the link to the plane failed")
            self._fail(f"internal fault: {error!r}")

    def _serve_one_connection(self) -> bool:
        """Returns whether all is done; if not, the plane is away and may come back."""
        try:
            with contextlib.ExitStack() as stack:
                address = self._address
                if address is None:
                    address = stack.enter_context(EmbeddedPlane()).address
                plane = stack.enter_context(connect(address))
                reconnected, self._plane = self._plane is not None, plane
                if reconnected:  # it may be another one, with an empty library
                    for signature in list(self._compiled.values()):
                        self._compile(signature, plane)
                self._serve(plane)
        except (PlaneError, RpcError) as error:
            if not self._may_come_back(error):
                raise
            self._recorder.disconnect()
            return False
        return True

    def _may_come_back(self, error: PlaneError | RpcError) -> bool:
        if self._failure is not None or (self._plane is None and self._address is None):
            return False  # a plane of one's own that does not start will not start later
        if isinstance(error, RpcError) and error.code not in _LOST:
            return False
        now_s = time.monotonic()
        if self._away_since_s is None:
            self._away_since_s = now_s
            if self._patience_s > 0:
                _log.warning("esper: the plane is away (%s); waiting for it to come back", error)
        return now_s - self._away_since_s < self._patience_s

    def _serve(self, plane: Plane) -> None:
        self._responses = None
        self._observations = queue.SimpleQueue()
        try:
            while self._failure is None:
                work = self._unfinished or self._work.get()
                if work is None:
                    return
                self._unfinished = work
                if not self._closing or work.outlives_run:
                    self._do(work, plane)
                self._unfinished = self._away_since_s = None
        finally:
            self._observations.put(None)

    def _do(self, work: _Work, plane: Plane) -> None:
        try:
            work.run(plane)
        except RpcError as error:
            if work.vital or error.code not in _REFUSALS:
                raise
            _log.warning("esper: the plane refused %s", error)

    def _compile(self, signature: kernel_pb2.KernelSignature, plane: Plane) -> None:
        for candidate in self._candidates:
            self._kernels.update(dict.fromkeys(_compile_candidate(candidate, signature, plane)))

    def _advise(self, plane: Plane, observation: controller_pb2.Observation) -> None:
        graph = observation.host_graph
        if self._responses is None:
            self._responses = plane.tamiyo.advise(iter(self._observations.get, None), self._memory)
        elif self._graph is not None and self._graph.digest == graph.digest:
            observation = _without_graph(observation)
        observation.kernels[:] = self._kernels  # the library holds those of other runs as well
        self._observations.put(observation)
        response = next(self._responses, None)
        if response is None:
            raise PlaneError("it ended the stream of advice")
        advice: list[Advice] = []
        for decision in response.decisions:
            try:
                advice.append(self._complete(plane, decision))
            except RpcError as error:
                if error.code not in _REFUSALS:
                    raise
                _log.warning("esper: decision %s has no kernel: %s", decision.id, error)
        self._graph = graph
        with self._arrived:
            self._memory = response.memory
            self._advice.extend(advice)
            self._answered_epoch = response.epoch
            self._arrived.notify_all()

    def _complete(self, plane: Plane, decision: controller_pb2.Decision) -> Advice:
        if decision.action != controller_pb2.ACTION_GERMINATE:
            return Advice(decision)
        kernel = plane.urza.get_kernel(decision.kernel).kernel
        digest = kernel_digest(kernel)
        if decision.kernel != f"kernels/{digest}":
            raise PlaneError(f"it served kernels/{digest} as {decision.kernel}")
        weights = None
        if kernel.HasField("weights"):
            weights = weights_from_bytes(plane.urza.read_blob(kernel.weights), kernel)
        return Advice(decision, kernel, weights)


def _request_id(message: Message, position: int) -> str:
    """Names a message by what it says and when, so that it counts once however often it is sent."""
    content = message.SerializeToString(deterministic=True)
    return hashlib.sha256(position.to_bytes(8, "big") + content).hexdigest()


def _without_graph(observation: controller_pb2.Observation) -> controller_pb2.Observation:
    copy = controller_pb2.Observation()
    copy.CopyFrom(observation)
    copy.ClearField("host_graph")
    return copy


def _compile_candidate(
    candidate: Candidate, signature: kernel_pb2.KernelSignature, plane: Plane
) -> Iterator[str]:
    """Compiles a candidate in all its ranks for one place; yields the kernels' names."""
    for rank in _ranks(candidate):
        blueprint = _blueprint(candidate, rank)
        if _source(blueprint) != signature.source:
            return
        try:
            yield plane.tezzeret.compile(blueprint, signature).name
        except CompileError as error:
            _log.warning("esper: %s of rank %s: %s", candidate.blueprint, rank, error)


def _ranks(candidate: Candidate) -> tuple[int | None, ...]:
    return candidate.ranks or (None,)


def _blueprint(candidate: Candidate, rank: int | None) -> blueprint_pb2.Blueprint:
    given = dict(candidate.hyperparameters)
    if rank is not None:
        given["rank"] = rank
    return blueprints.get(candidate.blueprint, **given)


def _source(blueprint: blueprint_pb2.Blueprint) -> blueprint_pb2.SeedSource:
    return blueprint.graph.inputs[0].source
