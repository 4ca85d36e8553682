// How a slot's computing seeds are described to the operators: a flat list of integers, kPlanWidth per
// seed, rebuilt only when a lifecycle event happens. esper/kasmina/ops.py mirrors it as SeedPlan.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace esper {

// row          row of the seed in `scalars` (alpha_fwd, alpha_bwd, gamma)
// offset       first feature of the seed's chunk
// width        features of the chunk, d. Chunks are in ascending order and do not overlap.
// source       0: reads its chunk of the slot's output h, S = d; 1: reads the slot's input x, S = D_in
// family       0: bottleneck g = act(src A + a) B + b, or with a gate (act(src A + a) * (src G + c)) B + b
//              1: affine     g = w * src + b, which needs S = d
//              2: squeeze-excite g = src * tanh(B act(A pool(src) + a) + b), which needs S = d, where pool
//                 averages over the positions of a sample; h is [samples, positions..., D]
//              3: depthwise  g = B act(A (*) src + a) + b, where (*) correlates each feature with a window of
//                 its own over the positions, zeros beyond the edge; h is [samples, T, D] or
//                 [samples, H, W, D]
// activation   0 identity, 1 relu, 2 gelu (erf), 3 silu, 4 tanh; 0 for affine
// gated        0 or 1; 0 for any but a bottleneck
// rank         hidden features, r >= 1; 0 for affine; S for depthwise
// first_param  index of the seed's first tensor in `params`. In order, those in brackets where their bit
//              in `biases` is set or the seed is gated:
//              bottleneck A [S, r], (a [r]), (G [S, r]), (c [r]), B [r, d], (b [d]); affine w [d], (b [d]);
//              squeeze-excite A [r, S, 1...], (a [r]), B [d, r, 1...], (b [d]); depthwise
//              A [S, 1, window...], (a [S]), B [d, S, 1...], (b [d]), with an axis for each position axis
// biases       bit 0: a, bit 1: c, bit 2: b
// window       side of the window, odd; 0 for any but depthwise
inline constexpr std::array<const char*, 11> kPlanFields = {
    "row",   "offset", "width",       "source", "family", "activation",
    "gated", "rank",   "first_param", "biases", "window"};
inline constexpr std::int64_t kPlanWidth = kPlanFields.size();

inline constexpr std::int64_t kBiasHidden = 1;
inline constexpr std::int64_t kBiasGate = 2;
inline constexpr std::int64_t kBiasOutput = 4;

// Columns of a record that are read outside of the operators' own checks.
inline constexpr std::size_t kPlanRow = 0;
inline constexpr std::size_t kPlanWidthOfChunk = 2;
inline constexpr std::size_t kPlanFamily = 4;
inline constexpr std::size_t kPlanGated = 6;
inline constexpr std::size_t kPlanFirstParam = 8;
inline constexpr std::size_t kPlanBiases = 9;

// How many tensors of `params` a record names.
constexpr std::int64_t num_params(const std::int64_t* record) {
  const std::int64_t products = record[kPlanFamily] == 1 ? 1 : 2;  // affine has one
  return products + record[kPlanGated] + std::popcount(static_cast<std::uint64_t>(record[kPlanBiases]));
}

}  // namespace esper
