"""Places in a slot, as kernels are made for them."""

import torch

from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import signal_pb2
from esper.kasmina.grafts import Place
from esper.kasmina.layer import KasminaLayer

_DTYPES = {
    torch.float32: kernel_pb2.DATA_TYPE_FLOAT32,
    torch.float64: kernel_pb2.DATA_TYPE_FLOAT64,
    torch.bfloat16: kernel_pb2.DATA_TYPE_BFLOAT16,
    torch.float16: kernel_pb2.DATA_TYPE_FLOAT16,
}
_DEVICE_CLASSES = {
    "cpu": kernel_pb2.DEVICE_CLASS_CPU,
    "cuda": kernel_pb2.DEVICE_CLASS_CUDA,
}


def place_of(layer: KasminaLayer, seed: int) -> Place:
    """Returns where a graft of a seed goes.

    Raises:
        ValueError: If the slot's element type or device is not known yet.
    """
    dtype, device = layer.placement
    if dtype is None or device is None:
        raise ValueError(f"slot {layer.name!r} has not been seen; {_RUN_FIRST}")
    return Place(layer.name, seed, dtype, device)


def signature_of(
    layer: KasminaLayer, seed: int, source: blueprint_pb2.SeedSource
) -> kernel_pb2.KernelSignature:
    """Returns what a kernel must fit to be planted in a seed.

    Args:
        layer: The slot.
        seed: Index of the seed.
        source: What the kernel reads.

    Raises:
        ValueError: If the place is not known yet, or no kernel can fit it.
    """
    if layer.width is None:
        raise ValueError(f"slot {layer.name!r} has no known width; {_RUN_FIRST}")
    begin, end = layer.bounds[seed]
    if source == blueprint_pb2.SEED_SOURCE_OUTPUT:
        source_width = end - begin
    elif source == blueprint_pb2.SEED_SOURCE_INPUT:
        if layer.source_width is None:
            raise ValueError(
                f"source is INPUT, but the input of slot {layer.name!r} is not known to be a "
                "floating-point tensor with the tokens of its output"
            )
        source_width = layer.source_width
    else:
        raise ValueError(f"source is {source}, but it must be OUTPUT or INPUT")
    dtype, device = layer.placement
    if dtype is None:
        raise ValueError(f"slot {layer.name!r} has no known floating-point type; {_RUN_FIRST}")
    if dtype not in _DTYPES:
        known = ", ".join(str(known) for known in _DTYPES)
        raise ValueError(f"slot {layer.name!r} is of type {dtype}, but it must be {known}")
    if device is None or device.type not in _DEVICE_CLASSES:
        known = ", ".join(_DEVICE_CLASSES)
        raise ValueError(f"slot {layer.name!r} is on {device}, but it must be on {known}")
    return kernel_pb2.KernelSignature(
        slot_kind=layer.kind,
        chunk_width=end - begin,
        source_width=source_width,
        source=source,
        dtype=_DTYPES[dtype],
        device_class=_DEVICE_CLASSES[device.type],
    )


def slot_info(layer: KasminaLayer) -> signal_pb2.SlotInfo:
    """Returns what the plane is told about a slot; what is not known yet is absent."""
    info = signal_pb2.SlotInfo(
        kind=layer.kind,
        chunk_widths=[end - begin for begin, end in layer.bounds],
    )
    if layer.inlet.name is not None:
        info.entry = layer.inlet.name
    if layer.dtype in _DTYPES:
        info.dtype = _DTYPES[layer.dtype]
    if layer.device is not None and layer.device.type in _DEVICE_CLASSES:
        info.device_class = _DEVICE_CLASSES[layer.device.type]
    if layer.width is not None:
        info.width = layer.width
    if layer.source_width is not None:
        info.source_width = layer.source_width
    return info


_RUN_FIRST = "run one forward of the wrapped model first"
