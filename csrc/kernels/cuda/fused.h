// Launchers of the fused kernels of bottleneck seeds: one launch forward and one backward for all seeds that fit,
// on tensor cores. No CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/seed.h"
#include "kernels/stats.h"

namespace esper::cuda {

inline constexpr std::int64_t kMaxFusedRank = 64;
inline constexpr std::int64_t kTileTokens = 64;
// A block takes every `blocks`-th tile, so that sums have one order on every device.
inline constexpr std::int64_t kMaxTokenBlocks = 64;

constexpr std::int64_t token_blocks(std::int64_t tokens) {
  const std::int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  return tiles < kMaxTokenBlocks ? tiles : kMaxTokenBlocks;
}

constexpr bool fuses(const SeedShape& shape) {
  return shape.family == Family::kBottleneck && shape.rank >= 1 && shape.rank <= kMaxFusedRank;
}

// One seed of a fused call; parameters and their gradients are float32.
struct FusedSeed {
  SeedShape shape;
  SeedScalars scalars;
  SeedTensors<const float> params;
  double* energy = nullptr;  // [tokens] energy of g, -1 where a token is contained; null where not wanted
  bool writes = false;       // y's chunk in forward
  // Backward.
  SeedTensors<float> grads;   // null where not wanted
  float* partial = nullptr;   // [token_blocks(tokens), partial_size(shape)], zero at first
  bool sends = false;         // adds gamma * dg/dsource to dh or dx
};

// Gradients of a seed side by side: A, a, G, c, B, b.
ESPER_HD constexpr std::int64_t partial_size(const SeedShape& shape) {
  return 2 * shape.source_width * shape.rank + 2 * shape.rank + shape.rank * shape.width + shape.width;
}

inline constexpr int kMaxFusedSeeds = 12;  // of a launch: its arguments hold 4 KiB

// Elements are uint16_t patterns of bfloat16 or float16, or float32 whose products are rounded to TF32.
enum class FusedElement { kBFloat16, kHalf, kTf32 };

// All tensors are contiguous, of the element's type.
struct FusedCall {
  FusedElement element = FusedElement::kBFloat16;
  std::int64_t tokens = 0, width = 0, input_width = 0;
  const void* h = nullptr;  // [tokens, width]
  const void* x = nullptr;  // [tokens, input_width]
  void* y = nullptr;        // forward: [tokens, width]
  const void* dy = nullptr;  // backward: [tokens, width]
  const void* dh_base = nullptr;  // what dh is before the seeds: dy itself, or dh where it is filled already
  void* dh = nullptr;        // [tokens, width]; null where not wanted
  void* dx = nullptr;        // [tokens, input_width], filled already; null where not wanted
  FusedSeed seeds[kMaxFusedSeeds];
  int num_seeds = 0;
};

static_assert(sizeof(FusedCall) <= 4096, "kernels take it as an argument");

// y = h + alpha_fwd * g in the chunks of the seeds that write. Null, or what went wrong with a launch.
const char* fused_forward(const FusedCall& call, void* stream);

// Gradients of parameters, and dh or dx of seeds that send. Seeds of one call must not send to the same
// elements: at most one of them may read x and send.
const char* fused_backward(const FusedCall& call, void* stream);

// Telemetry of h's chunk and of the energies of g, in two launches. `partial` is [token_blocks(tokens)].
const char* chunk_stats(FusedElement element, const void* h, std::int64_t tokens, std::int64_t width,
                        const SeedShape& shape, const double* energy, ChunkStats* partial, ChunkStats* stats,
                        void* stream);

}  // namespace esper::cuda
