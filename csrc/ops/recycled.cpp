#include "ops/recycled.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

namespace esper {
namespace {

constexpr std::size_t kPage = 2 << 20;
constexpr std::size_t kLeast = 128 << 10;     // smaller tensors come from torch; the heap keeps their memory
constexpr std::size_t kMostKept = 128 << 20;  // bytes that are kept while nobody uses them

struct Block {
  void* memory;
  std::size_t bytes;
};

class Pool {
 public:
  Block take(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    // The one given back last is the likeliest to be in cache.
    const auto found =
        std::find_if(kept_.rbegin(), kept_.rend(), [bytes](const Block& block) { return block.bytes == bytes; });
    if (found == kept_.rend()) return fresh(bytes);
    const Block block = *found;
    kept_.erase(std::next(found).base());
    num_kept_ -= bytes;
    return block;
  }

  void give_back(const Block& block) {
    const std::lock_guard lock(mutex_);
    kept_.push_back(block);
    num_kept_ += block.bytes;
    shrink(kMostKept);
  }

  void release() {
    const std::lock_guard lock(mutex_);
    shrink(0);
  }

 private:
  static Block fresh(std::size_t bytes) {
    const bool pages = bytes % kPage == 0;
    void* memory = std::aligned_alloc(pages ? kPage : kLeast, bytes);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (pages) madvise(memory, bytes, MADV_HUGEPAGE);  // only advice: small pages do as well
#endif
    return {memory, bytes};
  }

  void shrink(std::size_t most) {
    while (num_kept_ > most) {  // the oldest goes
      num_kept_ -= kept_.front().bytes;
      std::free(kept_.front().memory);
      kept_.pop_front();
    }
  }

  std::mutex mutex_;
  std::deque<Block> kept_;
  std::size_t num_kept_ = 0;
};

Pool& pool() {
  static auto* const only = new Pool;  // tensors may outlive what is destroyed at exit
  return *only;
}

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  pool().give_back(*block);
  delete block;
}

}  // namespace

at::Tensor recycled_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto bytes =
      static_cast<std::size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  if (bytes < kLeast) return at::empty(sizes, options);
  const auto unit = bytes < kPage / 2 ? kLeast : kPage;
  auto* block = new Block(pool().take((bytes + unit - 1) / unit * unit));
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                       c10::DataPtr(block->memory, block, &release, c10::Device(c10::kCPU)),
                       c10::GetCPUAllocator(), /*resizable=*/true);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), options.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

void release_recycled() { pool().release(); }

}  // namespace esper
