// The norm of many tensors together in one pass, on the CPU: torch calls an operator for each of them.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>

#include "kernels/cpu/slot.h"

namespace esper {
namespace {

at::Tensor total_norm(at::TensorList tensors) {
  double sum = 0.0;
  for (const auto& given : tensors) {
    TORCH_CHECK_VALUE(given.is_cpu() && given.is_floating_point(),
                      "tensors must be of a floating-point type and on the CPU");
    const bool dense = given.is_non_overlapping_and_dense();  // whatever the order of its elements
    const auto type = given.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const auto tensor = (dense ? given : given.contiguous()).to(type);
    sum += type == at::kDouble
               ? cpu::slot_kernels<double>().square_sum(tensor.const_data_ptr<double>(), tensor.numel())
               : cpu::slot_kernels<float>().square_sum(tensor.const_data_ptr<float>(), tensor.numel());
  }
  return at::scalar_tensor(std::sqrt(sum), at::TensorOptions().dtype(at::kFloat));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(esper, m) { m.def("total_norm(Tensor[] tensors) -> Tensor"); }

TORCH_LIBRARY_IMPL(esper, CPU, m) { m.impl("total_norm", &total_norm); }

}  // namespace esper
