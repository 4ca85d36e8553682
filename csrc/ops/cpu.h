// Slot calls on the CPU whose arguments are checked: what the operators and SlotProgram share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops/slot.h"

namespace esper {

// `keep`: whether the hidden layer is kept for backward.
Outputs forward_on_cpu(const SlotCall& call, const at::Tensor& h, const std::optional<at::Tensor>& x,
                       at::TensorList params, bool telemetry, bool keep);

// `hidden` is undefined where none was kept. Parameters' gradients that are not needed are undefined; `together`:
// whether the others may share one block of memory.
Gradients backward_on_cpu(const SlotCall& call, const at::Tensor& dy, const std::optional<at::Tensor>& h,
                          const std::optional<at::Tensor>& x, at::TensorList params, const at::Tensor& hidden,
                          at::IntArrayRef need, bool together = false);

}  // namespace esper
