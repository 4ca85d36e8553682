"""Finds and loads the native core, and says what it was built from.

It is looked at when `esper` is imported, and loaded when it is used: a command line, or a server
that stores things, needs no torch.
"""

import mmap
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

_MARKER = b"esper-built-against-torch="
_REMEDY = "run `make setup`, or `pip install -e . --no-build-isolation` in this environment"


@dataclass(frozen=True)
class BuildInfo:
    """What the native core was built from.

    Attributes:
        torch_version: Full version of the torch that it was compiled against, such as `2.13.0+cpu`.
        cuda_archs: Compute capabilities with machine code, such as `("80", "90")`; empty without
            CUDA.
        compiler: Name and version of the C++ compiler.
        cpu_capability: Instruction set that the CPU kernels use in this process.
    """

    torch_version: str
    cuda_archs: tuple[str, ...]
    compiler: str
    cpu_capability: str

    @property
    def cuda(self) -> bool:
        """Whether CUDA kernels are part of the build."""
        return bool(self.cuda_archs)


def recorded_torch(library: Path) -> str | None:
    """Returns the torch version that a library names, without loading it; None without one."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(_MARKER)
        if start < 0:
            return None
        start += len(_MARKER)
        return data[start : data.find(b";", start)].decode("ascii")


def check_library(library: Path | None, running: str) -> None:
    """Raises ImportError unless `library` exists and was built against the torch that runs.

    Args:
        library: The file of `esper._C`, or None where there is none.
        running: Version of torch; what follows a `+` does not matter, as it names no ABI.

    Raises:
        ImportError: With one sentence that says what to run.
    """
    if library is None:
        raise ImportError(f"esper's native core is not built: {_REMEDY}.")
    built = recorded_torch(library)
    if built is None or built.partition("+")[0] != running.partition("+")[0]:
        raise ImportError(
            f"esper's native core was built against torch {built} but torch {running} is "
            f"installed: {_REMEDY}."
        )


def check() -> None:
    """Raises ImportError where the core is missing or was built against another torch.

    Loads neither the core nor torch.
    """
    spec = find_spec("esper._C")
    library = None if spec is None or spec.origin is None else Path(spec.origin)
    check_library(library, version("torch"))


def load() -> None:
    """Loads `esper._C`, which registers the operators.

    Raises:
        ImportError: Where it does not load.
    """
    import torch  # noqa: F401  # its libraries must be there first

    try:
        import_module("esper._C")
    except ImportError as error:
        raise ImportError(f"esper's native core does not load ({error}): {_REMEDY}.") from error


def build_info() -> BuildInfo:
    """Returns what the native core was built from; loads it.

    Raises:
        ImportError: Where it does not load.
    """
    load()
    core = import_module("esper._C")
    return BuildInfo(
        torch_version=core.TORCH_VERSION,
        cuda_archs=tuple(core.CUDA_ARCHS.split(",")) if core.CUDA_ARCHS else (),
        compiler=core.COMPILER,
        cpu_capability=core.cpu_capability(),
    )
