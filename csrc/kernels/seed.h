// One computing seed as the kernels of every device see it.
#pragma once

#include <cstdint>

#include "kernels/math.h"

namespace esper {

enum class Source : std::int64_t { kOutput = 0, kInput = 1 };
enum class Family : std::int64_t { kBottleneck = 0, kAffine = 1, kSqueezeExcite = 2, kDepthwise = 3 };
inline constexpr std::int64_t kNumFamilies = 4;
inline constexpr std::int64_t kMaxWindow = 31;

// Whether a token's g depends on other tokens of its sample, so that blocks of tokens cannot be taken alone.
constexpr bool is_spatial(Family family) {
  return family == Family::kSqueezeExcite || family == Family::kDepthwise;
}

// Shape and kind. The fields are described in ops/plan.h.
struct SeedShape {
  std::int64_t offset = 0;
  std::int64_t width = 0;
  std::int64_t source_width = 0;
  std::int64_t rank = 0;
  Source source = Source::kOutput;
  Family family = Family::kBottleneck;
  Activation activation = Activation::kIdentity;
  bool gated = false;
  std::int64_t window_height = 0, window_width = 0;  // of a depthwise seed; odd
};

// Row-major parameters, or their gradients; null where the seed has none. Those of spatial seeds are laid out
// as convolutions lay them out.
template <class T>
struct SeedTensors {
  T* A = nullptr;  // [S, r]; squeeze-excite [r, S]; depthwise [S, window (, window)]
  T* a = nullptr;  // [r]
  T* G = nullptr;  // [S, r]
  T* c = nullptr;  // [r]
  T* B = nullptr;  // [r, d]; affine w [d]; squeeze-excite [d, r]; depthwise [d, S]
  T* b = nullptr;  // [d]
};

// The tokens of a call as positions of samples; one position axis is a height.
struct Positions {
  std::int64_t samples = 0, height = 0, width = 0;
  ESPER_HD std::int64_t per_sample() const { return height * width; }
};

struct SeedScalars {
  float alpha_fwd = 0.0f;
  float alpha_bwd = 0.0f;
  float gamma = 0.0f;
};

}  // namespace esper
