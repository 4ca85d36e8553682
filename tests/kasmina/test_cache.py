import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule

from esper.blueprints import get
from esper.blueprints import kernel_digest
from esper.blueprints import lower
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.kasmina.cache import KernelCache
from esper.kasmina.prepared import PreparedKernel

SIGNATURE = kernel_pb2.KernelSignature(
    slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
    chunk_width=4,
    source_width=4,
    source=blueprint_pb2.SEED_SOURCE_OUTPUT,
    dtype=kernel_pb2.DATA_TYPE_FLOAT32,
    device_class=kernel_pb2.DEVICE_CLASS_CPU,
)
KERNEL = lower(get("affine"), SIGNATURE)


def entry(digest, num_floats):
    kernel = kernel_pb2.Kernel()
    kernel.CopyFrom(KERNEL)
    kernel.blueprint_name = digest
    return PreparedKernel.of(kernel, digest, {"A": torch.zeros(num_floats)})


def test_an_entry_is_charged_for_kernel_and_weights():
    assert entry("a", 100).num_bytes == 400 + entry("a", 0).kernel.ByteSize()
    assert PreparedKernel.of(KERNEL).num_bytes == KERNEL.ByteSize()


def test_the_least_recently_used_kernel_goes_first():
    size = entry("a", 100).num_bytes
    cache = KernelCache(2 * size)
    for digest in "ab":
        cache.put(entry(digest, 100))
    assert cache.get("a") is not None  # b is now the older one
    cache.put(entry("c", 100))
    assert cache.get("b") is None
    assert cache.get("a") is not None and cache.get("c") is not None
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.evictions) == (3, 1, 1)
    assert stats.num_bytes == stats.capacity_bytes == 2 * size


def test_kernels_in_use_stay_even_over_capacity():
    cache = KernelCache(entry("a", 100).num_bytes)
    cache.put(entry("a", 100), in_use=True)
    cache.put(entry("a", 100), in_use=True)
    cache.put(entry("b", 200))
    assert cache.get("a") is not None and cache.get("b") is None
    cache.release("a")
    cache.put(entry("b", 200))
    assert cache.get("a") is not None
    cache.release("a")  # within capacity by itself: it stays for the next time
    assert cache.stats().num_kernels == 1


def test_without_capacity_only_kernels_in_use_are_held():
    cache = KernelCache(0)
    cache.put(entry("a", 1))
    assert cache.stats().num_kernels == 0
    cache.put(entry("a", 1), in_use=True)
    assert cache.stats().num_kernels == 1
    cache.release("a")
    assert cache.stats().num_kernels == 0
    with pytest.raises(ValueError, match="capacity_bytes is -1"):
        KernelCache(-1)


def test_a_digest_is_that_of_the_kernel_whether_held_or_not():
    cache = KernelCache(10**6)
    other = lower(get("lora"), SIGNATURE)
    cache.put(PreparedKernel.of(KERNEL))
    for kernel in (KERNEL, other, KERNEL):
        assert cache.digest(kernel) == kernel_digest(kernel)
    renamed = kernel_pb2.Kernel()
    renamed.CopyFrom(KERNEL)
    renamed.blueprint_name = "for people only"
    assert cache.digest(renamed) == cache.digest(KERNEL)
    cache.put(PreparedKernel.of(renamed))  # takes the other's place
    assert cache.stats().num_kernels == 1
    assert cache.digest(KERNEL) == kernel_digest(KERNEL)


class CacheMachine(RuleBasedStateMachine):
    """Against a plain list in order of use."""

    def __init__(self):
        super().__init__()
        self.capacity = 3 * entry("a", 10).num_bytes
        self.cache = KernelCache(self.capacity)
        self.order = []  # oldest first
        self.sizes = {}
        self.uses = {}

    def shrink(self):
        for digest in list(self.order):
            if sum(self.sizes[d] for d in self.order) <= self.capacity:
                break
            if not self.uses.get(digest):
                self.order.remove(digest)

    @rule(digest=st.sampled_from("abcdef"), size=st.sampled_from([1, 10, 25]), in_use=st.booleans())
    def put(self, digest, size, in_use):
        self.cache.put(entry(digest, size), in_use=in_use)
        self.uses[digest] = self.uses.get(digest, 0) + in_use
        if digest in self.order:
            self.order.remove(digest)
        self.order.append(digest)
        self.sizes[digest] = entry(digest, size).num_bytes
        self.shrink()

    @rule(digest=st.sampled_from("abcdef"))
    def get(self, digest):
        assert (self.cache.get(digest) is not None) == (digest in self.order)
        if digest in self.order:
            self.order.remove(digest)
            self.order.append(digest)

    @precondition(lambda self: any(self.uses.values()))
    @rule(data=st.data())
    def release(self, data):
        digest = data.draw(st.sampled_from([d for d, count in self.uses.items() if count]))
        self.cache.release(digest)
        self.uses[digest] -= 1
        self.shrink()

    @invariant()
    def agrees(self):
        stats = self.cache.stats()
        assert stats.num_kernels == len(self.order)
        assert stats.num_bytes == sum(self.sizes[digest] for digest in self.order)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, deadline=None)
