// A slot's plan, ready to be run on plain tensors of the CPU without torch's dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace esper {

// Of a small call with many seeds most is spent before the kernels: a thousand parameters are boxed, unboxed and
// boxed again on their way through Python, dispatcher and autograd. A program computes exactly what
// the operators do, and records one node of autograd with the same gradients.
class SlotProgram {
 public:
  explicit SlotProgram(std::vector<std::int64_t> plan) : plan_(std::move(plan)) {}

  const std::vector<std::int64_t>& plan() const { return plan_; }

  // y and stats, as esper::slot_forward; none where only the dispatcher knows what to do (other devices, modes,
  // transforms, traced tensors) and where a parameter has neither float32 nor the host's type. Other arguments are
  // checked as the operator checks them. `direct`: whether backward adds to the parameters' .grad itself, unless
  // they have hooks, instead of passing each through torch's engine, which takes 2 us a parameter.
  // torch.autograd.grad then does not find the parameters.
  std::optional<std::pair<at::Tensor, at::Tensor>> run(const at::Tensor& h, const std::optional<at::Tensor>& x,
                                                       std::vector<at::Tensor> params,
                                                       const at::Tensor& scalars, bool telemetry,
                                                       bool direct) const;

 private:
  std::vector<std::int64_t> plan_;
};

}  // namespace esper
