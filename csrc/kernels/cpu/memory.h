// Scratch memory of the CPU kernels and operators.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace esper {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory aligned to a cache line, not initialised. Throws std::bad_alloc.
template <class T>
std::unique_ptr<T[], FreeMemory> aligned_memory(std::int64_t elements) {
  const auto bytes = (static_cast<std::size_t>(elements) * sizeof(T) + 64) / 64 * 64;
  auto* memory = static_cast<T*>(std::aligned_alloc(64, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  return std::unique_ptr<T[], FreeMemory>(memory);
}

}  // namespace esper
