// Prepares a SlotJob: pads and transposes parameters, lays out gradients and sizes scratch memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/slot.h"

namespace esper::cpu {

inline std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Takes memory in two passes: the first only counts.
template <class T>
class Arena {
 public:
  explicit Arena(T* memory) : memory_(memory) {}  // null while counting

  // [rows, columns] to [rows, columns_p]. Needs no memory where there is nothing to pad.
  const T* pad(const T* from, std::int64_t rows, std::int64_t columns, std::int64_t columns_p) {
    if (from == nullptr || columns == columns_p) return from;
    T* to = take(rows * columns_p);
    for (std::int64_t i = 0; to != nullptr && i < rows; ++i) {
      std::copy_n(from + i * columns, columns, to + i * columns_p);
      std::fill_n(to + i * columns_p + columns, columns_p - columns, T(0));
    }
    return to;
  }

  // [rows, columns] to [columns, rows_p].
  const T* transpose(const T* from, std::int64_t rows, std::int64_t columns, std::int64_t rows_p) {
    if (from == nullptr) return nullptr;
    T* to = take(columns * rows_p);
    if (to != nullptr) slot_kernels<T>().transpose(from, columns, rows, columns, to, rows_p);
    return to;
  }

  std::int64_t used() const { return used_; }

 private:
  T* take(std::int64_t elements) {  // whole vectors, so that every row starts on a vector
    const std::int64_t at = used_;
    used_ += elements;
    return memory_ == nullptr ? nullptr : memory_ + at;
  }

  T* memory_;
  std::int64_t used_ = 0;
};

template <class T>
T largest_magnitude(const T* values, std::int64_t count) {
  if (values == nullptr) return T(0);
  T largest = 0, doubt = 0;  // not 0 where any element is not finite
#pragma omp simd reduction(max : largest) reduction(+ : doubt)
  for (std::int64_t i = 0; i < count; ++i) {
    const T magnitude = std::abs(values[i]);
    doubt += magnitude - magnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return doubt == T(0) ? largest : std::numeric_limits<T>::infinity();
}

// Fills in everything of job.seeds but shape, scalars, trains and sends. `tensors[i]` are the row-major
// parameters of seed i, which must outlive the job.
template <class T>
void pack(SlotJob<T>& job, const std::vector<SeedTensors<const T>>& tensors, bool backward) {
  const std::int64_t lanes = slot_kernels<T>().lanes;
  for (const bool counting : {true, false}) {
    Arena<T> arena(job.arena.get());
    for (std::size_t i = 0; i < job.seeds.size(); ++i) {
      auto& seed = job.seeds[i];
      const auto& shape = seed.shape;
      const auto& from = tensors[i];
      if (seed.elsewhere) continue;
      seed.rank_p = round_up(shape.rank, lanes);
      seed.width_p = round_up(shape.width, lanes);
      seed.source_p = round_up(shape.source_width, lanes);
      const std::int64_t rows_B = shape.family == Family::kAffine ? 1 : shape.rank;
      seed.A = arena.pad(from.A, shape.source_width, shape.rank, seed.rank_p);
      seed.a = arena.pad(from.a, 1, shape.rank, seed.rank_p);
      seed.G = arena.pad(from.G, shape.source_width, shape.rank, seed.rank_p);
      seed.c = arena.pad(from.c, 1, shape.rank, seed.rank_p);
      seed.B = arena.pad(from.B, rows_B, shape.width, seed.width_p);
      seed.b = arena.pad(from.b, 1, shape.width, seed.width_p);
      if (backward && shape.family == Family::kBottleneck) {
        seed.Bt = arena.transpose(from.B, shape.rank, shape.width, seed.rank_p);
        if (seed.sends) {
          seed.At = arena.transpose(from.A, shape.source_width, shape.rank, seed.source_p);
          seed.Gt = arena.transpose(from.G, shape.source_width, shape.rank, seed.source_p);
        }
      }
      if (!counting) {
        seed.max_B = largest_magnitude(from.B, rows_B * shape.width);
        seed.max_b = largest_magnitude(from.b, shape.width);
        // An activation may make something finite of an infinite weight; its gradient would not be.
        T largest = std::max(seed.max_B, seed.max_b);
        for (const T* in : {from.A, from.G}) {
          largest = std::max(largest, largest_magnitude(in, shape.source_width * shape.rank));
        }
        for (const T* in : {from.a, from.c}) largest = std::max(largest, largest_magnitude(in, shape.rank));
        seed.broken = largest > std::numeric_limits<T>::max();
      }
    }
    if (counting) job.arena = aligned_memory<T>(arena.used());
  }

  std::int64_t at = 0;
  std::int64_t next_column = 0;
  for (const auto& seed : job.seeds) {
    const auto& shape = seed.shape;
    // Tiles of one block: two pre-activations, hidden, two gradients; g, dy and the source.
    job.scratch = std::max(job.scratch,
                           kBlock * (5 * seed.rank_p + 2 * seed.width_p + seed.source_p));
    if (backward) {
      GradLayout layout;
      const auto take = [&at](std::int64_t elements) {
        const std::int64_t start = at;
        at += elements;
        return start;
      };
      const std::int64_t rows_B = shape.family == Family::kAffine ? 1 : shape.rank;
      if (seed.trains) {
        layout.A = take(shape.rank * seed.source_p);
        layout.a = take(seed.rank_p);
        layout.G = take(shape.gated ? shape.rank * seed.source_p : 0);
        layout.c = take(shape.gated ? seed.rank_p : 0);
        layout.B = take(rows_B * seed.width_p);
        layout.b = take(seed.width_p);
      }
      layout.end = at;
      job.grads.push_back(layout);
    }
    const bool writes = backward ? seed.sends && shape.source == Source::kOutput &&
                                       shape.family == Family::kBottleneck
                                 : seed.scalars.alpha_fwd != 0.0f;
    if (writes) {
      if (shape.offset > next_column) job.copied.push_back({next_column, shape.offset});
      next_column = shape.offset + shape.width;
    }
  }
  if (next_column < job.width) job.copied.push_back({next_column, job.width});
}

}  // namespace esper::cpu
