// One computing seed as the kernels of every device see it.
#pragma once

#include <cstdint>

#include "kernels/math.h"

namespace esper {

enum class Source : std::int64_t { kOutput = 0, kInput = 1 };
enum class Family : std::int64_t { kBottleneck = 0, kAffine = 1 };

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
};

// Row-major parameters, or their gradients; null where the seed has none.
template <class T>
struct SeedTensors {
  T* A = nullptr;  // [S, r]
  T* a = nullptr;  // [r]
  T* G = nullptr;  // [S, r]
  T* c = nullptr;  // [r]
  T* B = nullptr;  // [r, d]; of an affine seed w [d]
  T* b = nullptr;  // [d]
};

struct SeedScalars {
  float alpha_fwd = 0.0f;
  float alpha_bwd = 0.0f;
  float gamma = 0.0f;
};

}  // namespace esper
