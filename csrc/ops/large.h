// Bottleneck seeds whose weights outgrow the second level of cache: their products go to torch's BLAS.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/stats.h"
#include "ops/slot.h"

namespace esper {

// Bytes of a seed's matrices from which on the BLAS is faster (docs/results/2026-11-24-slot-kernels.md).
inline constexpr std::int64_t kLargeWeights = 1 << 20;

// Whether a seed's products go to the BLAS. It depends on the plan and the type alone.
bool is_large(const PlannedSeed& seed, at::ScalarType compute_type);

// Writes the chunks of the large seeds to `y`. `stats` is null without telemetry; else energy and contained
// tokens are added to the seed's entry. `hidden` is undefined unless pre-activations are kept. `params` are in
// the type that is computed in.
void forward_large(const SlotCall& call, const at::Tensor& h, const std::optional<at::Tensor>& x,
                   at::TensorList params, const at::Tensor& y, const at::Tensor& hidden, ChunkStats* stats);

// Adds what the large seeds send to `dh` and `dx`, which may be undefined, and puts their parameters'
// gradients into `dparams`, in the type that is computed in; leaves undefined what is zero or not needed.
void backward_large(const SlotCall& call, const at::Tensor& dy, const std::optional<at::Tensor>& h,
                    const std::optional<at::Tensor>& x, at::TensorList params, const at::Tensor& hidden,
                    at::IntArrayRef need, const at::Tensor& dh, const at::Tensor& dx, std::vector<at::Tensor>& dparams);

}  // namespace esper
