// The seeds of a slot call that the fused CUDA kernels take: bottlenecks of moderate rank in hosts of 16-bit
// elements, or of float32 where torch is allowed to round products to TF32.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "kernels/cuda/fused.h"
#include "ops/slot.h"

namespace esper {

class FusedSeeds {
 public:
  // `host` is h, or dy in backward.
  FusedSeeds(const SlotCall& call, const at::Tensor& host, at::TensorList params, void* stream);

  bool takes(std::size_t seed) const { return taken_[seed]; }

  // Whether y, or dh, needs no value before the seeds have written it: their chunks are all there is.
  bool write_all(bool backward, bool need_dh) const;

  // Writes y's chunks, and the seeds' rows of stats [seeds, kNumStats] where it is not empty.
  void forward(const at::Tensor& h, const std::optional<at::Tensor>& x, at::Tensor& y, at::Tensor& stats) const;

  // Adds to dh and dx where they are defined, and sets the entries of dparams that are wanted, float32. `dh_base`
  // is what dh is without these seeds.
  void backward(const at::Tensor& dy, const std::optional<at::Tensor>& h, const std::optional<at::Tensor>& x,
                at::IntArrayRef need, const at::Tensor& dh_base, at::Tensor& dh, at::Tensor& dx,
                std::vector<at::Tensor>& dparams) const;

 private:
  cuda::FusedCall empty_call() const;
  cuda::FusedSeed seed(std::size_t i) const;
  bool sends(std::size_t i, bool need_dh, bool need_dx) const;

  const SlotCall& call_;
  void* stream_;
  cuda::FusedElement element_ = cuda::FusedElement::kBFloat16;
  std::vector<bool> taken_;
  std::vector<at::Tensor> params_;  // float32
};

}  // namespace esper
