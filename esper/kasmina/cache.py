"""The kernels that a model has seen, ready to be planted again without a fetch or a check."""

from collections import Counter
from collections import OrderedDict
from dataclasses import dataclass

from esper.blueprints import kernel_digest
from esper.common.v1 import kernel_pb2
from esper.kasmina.checks import check_whole
from esper.kasmina.prepared import PreparedKernel
from esper.kasmina.prepared import encode


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a kernel cache has done so far.

    Attributes:
        num_kernels: Kernels held now.
        num_bytes: Bytes held now.
        capacity_bytes: Most bytes that may be held, kernels in use apart.
        hits: Look-ups that found their kernel.
        misses: Look-ups that did not.
        evictions: Kernels dropped for want of space.
    """

    num_kernels: int
    num_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    evictions: int


class KernelCache:
    """Kernels by digest, the least recently used dropped first.

    Args:
        capacity_bytes: Most bytes to hold. Kernels in use are never dropped, and count.

    Raises:
        ValueError: If the capacity is negative.
    """

    def __init__(self, capacity_bytes: int) -> None:
        check_whole("capacity_bytes", capacity_bytes, 0)
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[str, PreparedKernel] = OrderedDict()  # oldest use first
        self._digests: dict[bytes, str] = {}  # of the kernels held, by their bytes
        self._uses: Counter[str] = Counter()
        self._num_bytes = 0
        self._hits = 0
        self._misses = 0
        self._evictions = 0

    def digest(self, kernel: kernel_pb2.Kernel) -> str:
        """Returns a kernel's digest, which is not computed again while the kernel is held."""
        return self._digests.get(encode(kernel)) or kernel_digest(kernel)

    def get(self, digest: str) -> PreparedKernel | None:
        """Returns a kernel and marks it as just used; None where it is not held."""
        entry = self._entries.get(digest)
        if entry is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(digest)
        return entry

    def put(self, entry: PreparedKernel, *, in_use: bool = False) -> None:
        """Adds a kernel, dropping others as needed.

        Args:
            entry: The kernel; takes the place of one of the same digest.
            in_use: Whether one more seed uses it from now on, so that it is not dropped itself.
        """
        digest = entry.digest
        if digest in self._entries:
            self._drop(digest)
        self._entries[digest] = entry
        self._digests[entry.encoded] = digest
        self._num_bytes += entry.num_bytes
        if in_use:
            self._uses[digest] += 1
        self._shrink()

    def release(self, digest: str) -> None:
        """Ends one use of a kernel.

        Raises:
            ValueError: If it is not in use.
        """
        if digest not in self._uses:
            raise ValueError(f"digest is {digest!r}, but it must be that of a kernel in use")
        self._uses[digest] -= 1
        if not self._uses[digest]:
            del self._uses[digest]
        self._shrink()

    def stats(self) -> CacheStats:
        """Returns what the cache holds and has done."""
        return CacheStats(
            num_kernels=len(self._entries),
            num_bytes=self._num_bytes,
            capacity_bytes=self._capacity_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    def _shrink(self) -> None:
        if self._num_bytes <= self._capacity_bytes:
            return
        for digest in [digest for digest in self._entries if self._uses[digest] == 0]:
            self._drop(digest)
            self._evictions += 1
            if self._num_bytes <= self._capacity_bytes:
                return

    def _drop(self, digest: str) -> None:
        entry = self._entries.pop(digest)
        del self._digests[entry.encoded]
        self._num_bytes -= entry.num_bytes
