// Launchers of the CUDA slot kernels: raw device pointers, 64-bit sizes and a stream; no CUDA header.
#pragma once

#include <cstdint>

#include "kernels/seed.h"
#include "kernels/stats.h"

namespace esper::cuda {

// One seed of a slot call. All pointers are to device memory.
template <class T>
struct SeedCall {
  SeedShape shape;
  SeedScalars scalars;
  SeedTensors<const T> params;
  std::int64_t tokens = 0, width = 0, input_width = 0;
  const T* h = nullptr;  // [tokens, width]
  const T* x = nullptr;  // [tokens, input_width]
  // Scratch, where r is S for depthwise seeds: pre-activations and hidden layer, each [tokens, r]; g [tokens, d]; energy of g [tokens], where
  // -1 marks a token that is contained.
  T *before = nullptr, *gate = nullptr, *hidden = nullptr, *g = nullptr;
  double* energy = nullptr;
  // Spatial seeds: where the tokens are, and for squeeze-excite three vectors for each sample, each
  // [samples, d], and its mark [samples], where -1 says that its tokens are contained.
  Positions positions;
  T* vectors = nullptr;
  double* trust = nullptr;

  ESPER_HD T* vector(std::int64_t i) const { return vectors + i * positions.samples * shape.width; }
  ESPER_HD T* pooled() const { return vector(0); }
  ESPER_HD T* excite() const { return vector(1); }  // the gate
  ESPER_HD T* moved() const { return vector(2); }   // its pre-activation's gradient
};

// y's chunk = h + alpha_fwd * g where alpha_fwd is not 0; y holds h before. `stats` may be null.
// Returns null, or what went wrong with a launch.
template <class T>
const char* forward(const SeedCall<T>& call, T* y, ChunkStats* stats, void* stream);

template <class T>
struct SeedGrads {
  const T* dy = nullptr;     // [tokens, width]
  SeedTensors<T> params;     // null where not wanted
  T* dsource = nullptr;      // dh or dx, which this seed adds gamma * dg/dsrc to; null where it does not send
};

template <class T>
const char* backward(const SeedCall<T>& call, const SeedGrads<T>& grads, void* stream);

}  // namespace esper::cuda
