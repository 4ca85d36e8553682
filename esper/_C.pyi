"""Types of the native core."""

TORCH_VERSION: str
TORCH_MARKER: str
CUDA_ARCHS: str
COMPILER: str

def cpu_capability() -> str: ...
