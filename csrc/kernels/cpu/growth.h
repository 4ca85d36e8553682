// The inner loops of growth probes on the CPU; esper/kasmina/growth.py says what they compute.
#pragma once

#include <cstdint>

namespace esper::cpu {

inline constexpr std::int64_t kGrowthFeatures = 32;  // F: a vector of floats

// Half-open range of the output's columns that a dormant seed owns.
struct GrowthChunk {
  std::int64_t begin, end;
};

// Shape of one probe. Groups are the input, where there is one, and then one for each chunk.
struct GrowthShape {
  std::int64_t rows, width, input_width;  // input_width 0: no seed reads the input
  std::int64_t basis;                     // F, or 2 F: features, then their pre-activations
  std::int64_t chunk_width;               // of the widest chunk
  std::int64_t num_chunks;
  const GrowthChunk* chunks;
};

struct GrowthKernels {
  // basis [groups, rows, basis] of h [rows, width] and x [rows, input_width], with the random projections
  // input_omega [input_width, F], output_omega [chunks, chunk_width, F] and offset [groups, F].
  void (*basis)(const GrowthShape& shape, const float* h, const float* x, const float* input_omega,
                const float* output_omega, const float* offset, float* basis);
  // Adds what gradients v [rows, width], each standing for `scale` rows, give to gram [groups, basis, basis],
  // input [width, basis], output [chunks, chunk_width, basis] and energy [width]. Returns false and adds
  // nothing where basis or v is not finite.
  bool (*accumulate)(const GrowthShape& shape, const float* basis, const float* v, float scale,
                     float* gram, float* input, float* output, float* energy);
};

// The build for the instruction set in use.
const GrowthKernels& growth_kernels();

}  // namespace esper::cpu
