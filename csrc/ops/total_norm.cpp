// The norm of many tensors together in one pass, on the CPU: torch calls an operator for each of them.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "kernels/cpu/slot.h"

namespace esper {
namespace {

double square_sum(const at::Tensor& given) {
  TORCH_CHECK_VALUE(given.is_cpu() && given.is_floating_point(),
                    "tensors must be of a floating-point type and on the CPU");
  const bool dense = given.is_non_overlapping_and_dense();  // whatever the order of its elements
  const auto type = given.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto tensor = (dense ? given : given.contiguous()).to(type);
  return type == at::kDouble
             ? cpu::slot_kernels<double>().square_sum(tensor.const_data_ptr<double>(), tensor.numel())
             : cpu::slot_kernels<float>().square_sum(tensor.const_data_ptr<float>(), tensor.numel());
}

at::Tensor norm_of(double sum) {
  return at::scalar_tensor(std::sqrt(sum), at::TensorOptions().dtype(at::kFloat));
}

at::Tensor total_norm(at::TensorList tensors) {
  double sum = 0.0;
  for (const auto& tensor : tensors) sum += square_sum(tensor);
  return norm_of(sum);
}

// The same of the gradients of parameters, which Python would have to make an object of each for. Nothing
// where there are none, or some that are not plain tensors on the CPU.
std::optional<at::Tensor> gradient_norm(at::TensorList parameters) {
  double sum = 0.0;
  bool any = false;
  for (const auto& parameter : parameters) {
    const auto& gradient = parameter.grad();
    if (!gradient.defined()) continue;
    const bool plain = gradient.is_cpu() && gradient.layout() == at::kStrided &&
                       !gradient.unsafeGetTensorImpl()->is_python_dispatch() && gradient.is_floating_point();
    if (!plain) return std::nullopt;
    any = true;
    sum += square_sum(gradient.detach());
  }
  return any ? std::optional(norm_of(sum)) : std::nullopt;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(esper, m) {
  m.def("total_norm(Tensor[] tensors) -> Tensor");
  m.def("gradient_norm(Tensor[] parameters) -> Tensor?", &gradient_norm);
}

TORCH_LIBRARY_IMPL(esper, CPU, m) { m.impl("total_norm", &total_norm); }

}  // namespace esper
