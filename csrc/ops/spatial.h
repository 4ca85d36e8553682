// The part of a slot call that its spatial seeds take, on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include "ops/slot.h"

namespace esper {

// A call with spatial seeds. `others` runs the other seeds and takes the telemetry of all chunks; the chunks
// of spatial seeds that blend are undefined in its y. Not called where there is nothing for it to do.
// y is laid out as h where h keeps its positions side by side.
Outputs spatial_forward(const SlotCall& call, const at::Tensor& h, const std::optional<at::Tensor>& x,
                        at::TensorList params, bool telemetry, const std::function<Outputs()>& others);

// The same backward: `others` gives the identity path, what the other seeds send, and gradients for all
// parameters, of which those of spatial seeds that train are replaced.
Gradients spatial_backward(const SlotCall& call, const at::Tensor& dy, const std::optional<at::Tensor>& h,
                           const std::optional<at::Tensor>& x, at::TensorList params, at::IntArrayRef need,
                           const std::function<Gradients()>& others);

}  // namespace esper
