// Tensors of a slot call as the CPU kernels read and write them: in place wherever they lie in a layout that
// the kernels know, whatever their floating-point type.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/movedim.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "kernels/cpu/slot.h"
#include "ops/recycled.h"
#include "ops/slot.h"

namespace esper {

// The layout of a tensor [..., D]; none where neither features nor tokens lie side by side, or where the tokens
// cannot be walked with two strides.
inline std::optional<cpu::View> layout_of(const at::Tensor& tensor) {
  struct Axis {
    std::int64_t size, stride;
  };
  cpu::View view;
  view.feature = tensor.size(-1) == 1 ? 1 : tensor.stride(-1);
  Axis axes[2] = {};  // from the inside out
  int used = 0;
  for (auto dim = tensor.dim() - 2; dim >= 0; --dim) {
    const Axis axis{tensor.size(dim), tensor.stride(dim)};
    if (axis.size == 1) continue;
    if (used > 0 && axis.stride == axes[used - 1].stride * axes[used - 1].size) {
      axes[used - 1].size *= axis.size;
    } else if (used == 2) {
      return std::nullopt;
    } else {
      axes[used++] = axis;
    }
  }
  view.inner = used > 0 ? axes[0].size : 1;
  view.token = used > 0 ? axes[0].stride : 0;
  view.outer = used > 1 ? axes[1].stride : 0;
  // A single token has its features to walk and nothing else.
  if (view.feature != 1 && (used == 0 || view.token != 1)) return std::nullopt;
  return view;
}

inline cpu::Element element_of(at::ScalarType type) {
  return type == at::kBFloat16 ? cpu::Element::kBFloat16
         : type == at::kHalf   ? cpu::Element::kHalf
                               : cpu::Element::kNative;
}

// Whether kernels that compute in `type` read and write tensors stored in `stored`.
inline bool storable(at::ScalarType stored, at::ScalarType type) {
  return stored == type || (type == at::kFloat && (stored == at::kBFloat16 || stored == at::kHalf));
}

// A tensor with its view, or neither.
struct Viewed {
  at::Tensor tensor;
  cpu::View view;

    // To be read by kernels that compute in `type`; copied only where they do not know its layout or its type.
  static Viewed input(const at::Tensor& given, at::ScalarType type) {
    Viewed result;
    const auto layout = layout_of(given);
    result.tensor = layout.has_value() ? given : given.contiguous();
    if (!storable(given.scalar_type(), type)) result.tensor = result.tensor.to(type).contiguous();
    result.view = *layout_of(result.tensor);
    result.view.element = element_of(result.tensor.scalar_type());
    result.view.data = const_cast<void*>(result.tensor.const_data_ptr());
    return result;
  }

  // To be written: of the sizes of `like`, in planes or contiguous, and of its type if kernels that compute in
  // `type` can write that, else of `type`.
  static Viewed output(const at::Tensor& like, at::ScalarType type, bool planes) {
    Viewed result;
    const auto options = like.options().dtype(storable(like.scalar_type(), type) ? like.scalar_type() : type);
    result.tensor = planes ? at::movedim(recycled_empty(at::movedim(like, -1, 1).sizes(), options), 1, -1)
                           : recycled_empty(like.sizes(), options);
    result.view = *layout_of(result.tensor);
    result.view.element = element_of(result.tensor.scalar_type());
    result.view.data = result.tensor.mutable_data_ptr();
    return result;
  }

  bool defined() const { return tensor.defined(); }

  // Whether the kernels need no tile in between: rows of features in the type that they compute in.
  bool direct(std::int64_t tokens) const {
    return view.element == cpu::Element::kNative && view.feature == 1 && view.inner >= tokens &&
           (view.token == tensor.size(-1) || tokens <= 1);
  }
};

}  // namespace esper
