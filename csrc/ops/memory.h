// Scratch memory of the CPU operators.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace esper {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory aligned to a cache line, not initialised.
template <class T>
std::unique_ptr<T[], FreeMemory> aligned_memory(std::int64_t elements) {
  const auto bytes = (static_cast<std::size_t>(elements) * sizeof(T) + 64) / 64 * 64;
  auto* memory = static_cast<T*>(std::aligned_alloc(64, bytes));
  TORCH_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes of scratch");
  return std::unique_ptr<T[], FreeMemory>(memory);
}

}  // namespace esper
