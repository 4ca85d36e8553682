// The kernels of spatial seeds, whose g depends on other tokens of the sample: squeeze-excite and depthwise.
// They run after the slot kernels, one sample at a time, and blend into what those left in y, dh and dx.
#pragma once

#include <cstdint>

#include "kernels/cpu/capability.h"
#include "kernels/seed.h"
#include "kernels/stats.h"

namespace esper::cpu {

// Elements that scratch is divided in; a vector of any instruction set fits.
inline constexpr std::int64_t kStep = 16;

constexpr std::int64_t in_steps(std::int64_t elements) { return (elements + kStep - 1) / kStep * kStep; }

// A tensor of samples, each a matrix whose rows are planes of positions, or positions of features: what is
// inside a row lies side by side.
template <class T>
struct Field {
  T* data = nullptr;
  std::int64_t sample = 0, row = 0;  // strides

  T* of(std::int64_t n) const { return data + n * sample; }
};

// Offsets of a seed's gradients in a worker's accumulator. B has rows of in_steps(r).
struct SpatialGrads {
  std::int64_t A = 0, a = 0, B = 0, b = 0, end = 0;
};

// One seed of a call. The fields start at the seed's own features.
template <class T>
struct SpatialJob {
  SeedShape shape;
  SeedScalars scalars;
  Positions positions;
  SeedTensors<const T> params;
  T max_B = 0, max_b = 0;  // largest magnitudes; infinite where any element is not finite
  bool planes = false;     // layout of every field: features outside, positions inside
  bool telemetry = false;  // forward: wants the energy
  bool trains = false;     // backward: wants the parameters' gradients
  bool sends = false;      // backward: sends to its source
  SpatialGrads grads;
  Field<const T> h, source, dy;
  Field<T> y, dsource;
};

// Offsets of a depthwise seed's tiles in a worker's scratch. It takes whole rows of positions at a time; its
// tiles have features outside and `count` positions inside.
struct DepthwiseTiles {
  std::int64_t rows = 0;          // rows of positions in a block
  std::int64_t count = 0;         // positions of a block, in steps
  std::int64_t padded_width = 0;  // a row with the zeros beyond both edges
  std::int64_t before = 0, hidden = 0, g = 0, dy = 0, turned = 0, flags = 0;
  std::int64_t plane = 0, spread = 0, response = 0, turned_window = 0, end = 0;

  DepthwiseTiles(const SeedShape& shape, const Positions& positions) {
    constexpr std::int64_t kPositions = 128;  // enough to divide the window's overlap and to fill vectors
    rows = kPositions / positions.width;
    rows = rows < 1 ? 1 : (rows > positions.height ? positions.height : rows);
    count = in_steps(rows * positions.width);
    padded_width = positions.width + shape.window_width - 1;
    // Inner loops run over whole steps, and a window reaches beyond the last of them.
    const std::int64_t reach = (shape.window_height - 1) * padded_width + shape.window_width - 1;
    const std::int64_t outputs = in_steps((rows + shape.window_height - 1) * padded_width);
    const auto take = [this](std::int64_t elements) {
      const std::int64_t at = end;
      end += in_steps(elements);
      return at;
    };
    before = take(shape.rank * count);  // in backward its derivative, then its gradient
    hidden = take(shape.rank * count);
    g = take(shape.width * count);
    dy = take(shape.width * count);
    turned = take(rows * positions.width * in_steps(shape.rank));
    flags = take(count);
    plane = take(outputs + reach);
    spread = take(outputs + 2 * reach);
    response = take(outputs);
    turned_window = take(shape.window_height * shape.window_width);
  }
};

// Offsets of a squeeze-excite seed's vectors.
struct SqueezeTiles {
  std::int64_t pooled = 0, hidden = 0, slope = 0, gate = 0, moved = 0, back = 0, end = 0;

  explicit SqueezeTiles(const SeedShape& shape) {
    const auto take = [this](std::int64_t elements) {
      const std::int64_t at = end;
      end += in_steps(elements);
      return at;
    };
    pooled = take(shape.width);
    hidden = take(shape.rank);
    slope = take(shape.rank);
    gate = take(shape.width);
    moved = take(shape.width);
    back = take(shape.width);
  }
};

template <class T>
struct SpatialKernels {
  // One sample. `scratch` holds the seed's tiles; `stats` has its energy and contained tokens added.
  void (*forward)(const SpatialJob<T>& job, std::int64_t sample, T* scratch, ChunkStats* stats);
  // Adds the parameters' gradients, not yet times alpha_bwd, to `accumulator`.
  void (*backward)(const SpatialJob<T>& job, std::int64_t sample, T* scratch, T* accumulator);
};

// The build for the instruction set in use.
template <class T>
const SpatialKernels<T>& spatial_kernels();

}  // namespace esper::cpu
