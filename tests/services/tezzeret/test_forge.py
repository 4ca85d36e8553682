"""The forge against a real library, in this process."""

from esper.blueprints.digest import blueprint_digest
from esper.blueprints.library import get
from esper.blueprints.lowering import lower
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.plane import Plane
from esper.services.tezzeret.forge import Forge
from esper.tezzeret.v1 import forge_pb2
from esper.urza.v1 import library_pb2


def place(width: int) -> kernel_pb2.KernelSignature:
    return kernel_pb2.KernelSignature(
        slot_kind=kernel_pb2.SLOT_KIND_NORM,
        chunk_width=width,
        source_width=width,
        source=blueprint_pb2.SEED_SOURCE_OUTPUT,
        dtype=kernel_pb2.DATA_TYPE_FLOAT32,
        device_class=kernel_pb2.DEVICE_CLASS_CPU,
    )


def stages(events: list[forge_pb2.CompileEvent]) -> list[str]:
    return [
        forge_pb2.CompileStage.Name(event.stage).removeprefix("COMPILE_STAGE_") for event in events
    ]


def test_work_that_another_forge_left_unfinished_is_finished(store_plane: Plane) -> None:
    library = store_plane.urza
    blueprint = get("lora", rank=3)
    stored = library.create_blueprint(blueprint)
    library.update_blueprint_state(stored.name, library_pb2.BLUEPRINT_STATE_COMPILING)
    left = library.create_kernel(lower(blueprint, place(31)), ["left"])
    assert left.state == library_pb2.KERNEL_STATE_TESTING
    events: list[forge_pb2.CompileEvent] = []
    Forge(library).compile(blueprint, place(31), ["mine"], events.append)
    assert stages(events) == ["CHECKED", "LOWERED", "VERIFIED", "STORED"]
    assert events[-1].kernel.name == left.name
    assert list(events[-1].kernel.tags) == ["left"]
    assert library.get_kernel(left.name).state == library_pb2.KERNEL_STATE_VALIDATED
    after = library.get_blueprint(stored.name).state
    assert after == library_pb2.BLUEPRINT_STATE_CHARACTERIZED


def test_further_kernels_leave_a_deployed_blueprint_deployed(store_plane: Plane) -> None:
    library = store_plane.urza
    blueprint = get("affine")
    Forge(library).compile(blueprint, place(32), [], lambda event: None)
    name = f"blueprints/{blueprint_digest(blueprint)}"
    library.update_blueprint_state(name, library_pb2.BLUEPRINT_STATE_DEPLOYED)
    events: list[forge_pb2.CompileEvent] = []
    Forge(library).compile(name, place(33), [], events.append)
    assert stages(events)[-1] == "STORED"
    assert library.get_blueprint(name).state == library_pb2.BLUEPRINT_STATE_DEPLOYED
