"""Watches of the library and its lineage, over a real socket."""

import itertools
import signal
import threading
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pytest
from urza_samples import HASH
from urza_samples import new_kernel
from urza_samples import refusal

from esper import blueprints
from esper.plane import connect
from esper.services.urza import library
from esper.services.urza.changes import ChangeLog
from esper.urza.client import UrzaClient
from esper.urza.v1 import library_pb2 as pb
from esper.urza.v1 import library_pb2_grpc

_ranks = itertools.count(5000)


def new_blueprint(urza: UrzaClient, parents: tuple[str, ...] = ()) -> pb.BlueprintRecord:
    return urza.create_blueprint(blueprints.get("bottleneck", rank=next(_ranks)), parents)


def changes(watch: Iterator[pb.WatchResponse], number: int) -> list[pb.WatchResponse]:
    found = (change for change in watch if change.WhichOneof("change"))
    return list(itertools.islice(found, number))


def test_a_watch_tells_every_change_as_it_was_then(urza: UrzaClient) -> None:
    urza.create_blueprint(blueprints.get("bottleneck"))
    with urza.watch() as watch:
        stored = new_blueprint(urza)
        urza.create_blueprint(stored.blueprint)  # changes nothing
        moved = urza.update_blueprint_state(stored.name, pb.BLUEPRINT_STATE_COMPILING)
        kernel = urza.create_kernel(new_kernel())
        silent = pb.FieldReport(kernel=kernel.name, run="r", verdict=pb.FIELD_VERDICT_CANCELLED)
        first = urza.record_field_report(silent)
        second = urza.record_field_report(
            pb.FieldReport(
                kernel=kernel.name, run="r", verdict=pb.FIELD_VERDICT_FOSSILIZED, gain=0.5
            )
        )
        greeting = next(watch)
        assert greeting.WhichOneof("change") is None
        told = changes(watch, 6)
    assert [change.revision - greeting.revision for change in told] == [1, 2, 3, 4, 5, 6]
    assert told[0].blueprint == stored
    assert told[1].blueprint == moved
    assert told[2].kernel == kernel
    assert told[3].report == first
    assert (told[4].kernel.name, told[4].kernel.mean_gain) == (kernel.name, 0.5)
    assert told[5].report == second
    assert told[4].kernel == urza.get_kernel(kernel.name)


def test_a_watch_resumes_anywhere_without_gap_or_repeat(urza: UrzaClient) -> None:
    with urza.watch() as watch:
        start = next(watch).revision
        names = [new_blueprint(urza).name for _ in range(5)]
        assert [change.blueprint.name for change in changes(watch, 5)] == names
    for offset in range(6):
        with urza.watch(start + 1 + offset) as watch:
            assert next(watch).revision == start + offset
            assert [c.blueprint.name for c in changes(watch, 5 - offset)] == names[offset:]


def test_a_quiet_watch_is_told_its_position(urza: UrzaClient) -> None:
    name = new_blueprint(urza).name
    revision = urza.get_blueprint(name).revision
    with urza.watch(revision, progress_interval_s=0.1) as watch:
        told = list(itertools.islice(watch, 4))
    assert [mark.WhichOneof("change") for mark in told] == [None, "blueprint", None, None]
    assert [mark.revision for mark in told] == [revision - 1, revision, revision, revision]


def test_watchers_all_see_the_same_while_many_write(urza: UrzaClient) -> None:
    writers, each, watchers = 4, 10, 3
    total = writers * each
    with ThreadPoolExecutor(writers + watchers) as threads:
        watches = [urza.watch() for _ in range(watchers)]
        seen = [threads.submit(changes, watch, total) for watch in watches]
        written = [
            threads.submit(lambda: [new_blueprint(urza).name for _ in range(each)])
            for _ in range(writers)
        ]
        names = {name for future in written for name in future.result(30)}
        histories = [future.result(30) for future in seen]
    for watch in watches:
        watch.close()
    assert {change.blueprint.name for change in histories[0]} == names
    revisions = [change.revision for change in histories[0]]
    assert revisions == list(range(revisions[0], revisions[0] + total))
    assert all(history == histories[0] for history in histories)


def test_closing_ends_a_waiting_watch(urza: UrzaClient) -> None:
    watch = urza.watch()
    threading.Timer(0.2, watch.close).start()
    assert [change.WhichOneof("change") for change in watch] == [None]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"start_revision": -1}, "start_revision"),
        ({"progress_interval_s": -1.0}, "progress_interval_s"),
        ({"progress_interval_s": 0.01}, "progress_interval_s"),
        ({"progress_interval_s": 3601.0}, "progress_interval_s"),
        ({"progress_interval_s": float("nan")}, "progress_interval_s"),
    ],
)
def test_senseless_watches_are_refused(
    library: library_pb2_grpc.LibraryServiceStub, fields: dict[str, float], field: str
) -> None:
    error = refusal(lambda: list(library.Watch(pb.WatchRequest(**fields))))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


def test_revisions_to_come_are_refused(urza: UrzaClient) -> None:
    revision = new_blueprint(urza).revision
    error = refusal(lambda: next(urza.watch(revision + 1000)))
    assert (error.code, error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "REVISION")
    assert int(error.metadata["revision"]) >= revision


def test_a_watch_goes_on_after_kill(start_server: Callable[..., object]) -> None:
    server = start_server("urza")
    with connect(server.address, timeout_s=20) as plane:
        watch = plane.urza.watch()
        names = [new_blueprint(plane.urza).name for _ in range(3)]
        seen = changes(watch, 2)
        server.stop(signal.SIGKILL)
        server = start_server("urza")
    with connect(server.address, timeout_s=20) as plane:
        names.append(new_blueprint(plane.urza).name)
        with plane.urza.watch(seen[-1].revision + 1) as watch:
            seen += changes(watch, 2)
            assert [change.blueprint.name for change in seen] == names
            assert [change.revision for change in seen] == [1, 2, 3, 4]
            server.stop(signal.SIGTERM)
            error = refusal(lambda: list(watch))
    assert error.code is grpc.StatusCode.UNAVAILABLE


def test_a_watcher_that_falls_behind_is_ended_and_told_where_to_go_on(
    serve_in_thread: Callable[..., object], short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "ChangeLog", partial(ChangeLog, max_changes=5))
    server = serve_in_thread(short_dir, ("urza",))
    with connect(server.address, timeout_s=30) as plane:
        slow = plane.urza.watch()
        assert next(slow).revision == 0
        for number in range(30):  # far more than a connection holds of what nobody reads
            blueprint = blueprints.get("bottleneck", rank=number + 1)
            blueprint.description = "x" * 200_000
            plane.urza.create_blueprint(blueprint)
        seen: list[int] = []
        error = refusal(lambda: seen.extend(change.revision for change in slow))
        assert (error.code, error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "COMPACTED")
        assert error.metadata == {"first_revision": "26", "revision": "30"}
        assert seen == list(range(1, len(seen) + 1))
        assert len(seen) < 25
        error = refusal(lambda: next(plane.urza.watch(25)))
        assert error.reason == "COMPACTED"
        with plane.urza.watch(26) as watch:
            assert [change.revision for change in changes(watch, 5)] == [26, 27, 28, 29, 30]
    server.stop()


# ---------------------------------------------------------------- lineage


def edges(found: "list[pb.LineageEdge]") -> set[tuple[str, str, int]]:
    return {(edge.parent, edge.child, edge.generation) for edge in found}


def test_lineage_is_told_in_both_directions(urza: UrzaClient) -> None:
    root = new_blueprint(urza).name
    left = new_blueprint(urza, (root,)).name
    right = new_blueprint(urza, (root, root)).name
    bottom = new_blueprint(urza, (left, right, root))
    assert list(bottom.parents) == [left, right, root]
    urza.create_blueprint(blueprints.get("bottleneck"))
    kernel = urza.create_kernel(new_kernel(), parents=[bottom.name])
    own = f"blueprints/{kernel.kernel.blueprint_digest}"
    assert list(kernel.parents) == [own, bottom.name]

    near = urza.lineage(bottom.name)
    assert edges(near.ancestors) == {(name, bottom.name, 1) for name in (left, right, root)}
    assert edges(near.descendants) == {(bottom.name, kernel.name, 1)}
    far = urza.lineage(kernel.name, depth=16)
    assert edges(far.ancestors) == {
        (own, kernel.name, 1),
        (bottom.name, kernel.name, 1),
        (left, bottom.name, 2),
        (right, bottom.name, 2),
        (root, bottom.name, 2),
        (root, left, 3),
        (root, right, 3),
    }
    generations = [edge.generation for edge in far.ancestors]
    assert generations == sorted(generations)
    assert not far.descendants and not far.truncated
    assert edges(urza.lineage(root, depth=2).descendants) == {
        (root, left, 1),
        (root, right, 1),
        (root, bottom.name, 1),
        (left, bottom.name, 2),
        (right, bottom.name, 2),
        (bottom.name, kernel.name, 2),
    }


def test_what_is_stored_keeps_its_parents(urza: UrzaClient) -> None:
    parent, other = new_blueprint(urza).name, new_blueprint(urza).name
    child = new_blueprint(urza, (parent,))
    assert urza.create_blueprint(child.blueprint, [other]) == child
    assert edges(urza.lineage(child.name).ancestors) == {(parent, child.name, 1)}


def test_parents_must_be_stored(urza: UrzaClient, kernel: pb.KernelRecord) -> None:
    for missing in (f"blueprints/{HASH}", f"kernels/{HASH}"):
        for call in (
            lambda missing=missing: new_blueprint(urza, (kernel.name, missing)),
            lambda missing=missing: urza.create_kernel(new_kernel(), parents=[missing]),
        ):
            error = refusal(call)
            assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_PARENT")
            assert error.metadata == {"name": missing}
    assert not urza.lineage(kernel.name).descendants  # nothing half done


@pytest.mark.parametrize(
    ("name", "depth", "field"),
    [
        ("", 1, "name"),
        (f"runs/{HASH}", 1, "name"),
        (f"kernels/{HASH[1:]}", 1, "name"),
        (f"blueprints/{HASH}", -1, "depth"),
        (f"blueprints/{HASH}", 17, "depth"),
    ],
)
def test_senseless_questions_are_refused(
    urza: UrzaClient, name: str, depth: int, field: str
) -> None:
    error = refusal(lambda: urza.lineage(name, depth))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


def test_a_great_family_is_cut(urza: UrzaClient) -> None:
    parent = urza.create_blueprint(blueprints.get("affine")).name
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: urza.create_kernel(new_kernel("affine")), range(1010)))
    found = urza.lineage(parent)
    assert len(found.descendants) == 1000
    assert found.truncated
    assert refusal(lambda: urza.lineage(f"kernels/{HASH}")).code is grpc.StatusCode.NOT_FOUND
