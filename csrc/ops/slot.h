// A slot call after its arguments are checked: what the CPU and the CUDA bindings share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/seed.h"
#include "ops/plan.h"

namespace esper {

// Positions of a seed's tensors in `params`; -1 where it has none.
struct ParamIndex {
  std::int64_t A = -1, a = -1, G = -1, c = -1, B = -1, b = -1;
};

struct PlannedSeed {
  SeedShape shape;
  SeedScalars scalars;
  ParamIndex params;
  std::int64_t hidden = 0;  // elements a token that seeds before it keep
};

struct SlotCall {
  at::ScalarType compute_type;  // double for double hosts, else float
  std::int64_t tokens = 0;
  std::int64_t width = 0;        // D
  std::int64_t input_width = 0;  // D_in; 0 where no seed reads the input
  std::int64_t hidden_width = 0; // elements a token of `hidden`: seed after seed the pre-activations [tokens, r] of
                                 // each bottleneck, then those of its gate
  bool reads_output = false;
  Positions positions;  // of calls with three axes or more
  std::vector<PlannedSeed> seeds;
};

// Checks everything that the kernels rely on. `host` is h, or dy in backward. Throws ValueError with a
// message that says which argument is wrong, what it is and what it must be.
SlotCall check_slot(const char* host_name, const at::Tensor& host, const std::optional<at::Tensor>& x,
                    at::TensorList params, const at::Tensor& scalars, at::IntArrayRef plan);

// The tensor as the kernels want it: the type they compute in, contiguous. No copy where it is so already.
at::Tensor as_operand(const at::Tensor& tensor, at::ScalarType type);

bool any_spatial(const SlotCall& call);

// Whether a tensor's positions lie side by side and its features apart, as the output of a convolution has it.
bool in_planes(const at::Tensor& tensor);

// As as_operand, contiguous or in planes.
at::Tensor laid_out(const at::Tensor& tensor, at::ScalarType type, bool planes);

// The tensors that a seed has: calls visit(member of SeedTensors, index in params, rows, columns) for each.
template <class T, class Visit>
void each_param(const PlannedSeed& seed, Visit visit) {
  using Tensors = SeedTensors<T>;
  const auto& s = seed.shape;
  const auto& p = seed.params;
  std::int64_t rows_A = s.source_width, columns_A = s.rank, rows_B = s.rank, columns_B = s.width;
  if (s.family == Family::kAffine) rows_B = 1;
  if (is_spatial(s.family)) {
    std::swap(rows_B, columns_B);
    if (s.family == Family::kSqueezeExcite) {
      std::swap(rows_A, columns_A);
    } else {
      columns_A = s.window_height * s.window_width;
    }
  }
  const auto call = [&visit](T* Tensors::*member, std::int64_t index, std::int64_t rows,
                             std::int64_t columns) {
    if (index >= 0) visit(member, static_cast<std::size_t>(index), rows, columns);
  };
  call(&Tensors::A, p.A, rows_A, columns_A);
  call(&Tensors::a, p.a, 1, s.rank);
  call(&Tensors::G, p.G, s.source_width, s.rank);
  call(&Tensors::c, p.c, 1, s.rank);
  call(&Tensors::B, p.B, rows_B, columns_B);
  call(&Tensors::b, p.b, 1, s.width);
}

// y, stats and hidden.
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// dh, dx and dparams.
using Gradients = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;

using SlotForward = Outputs(const at::Tensor& h, const std::optional<at::Tensor>& x, at::TensorList params,
                            const at::Tensor& scalars, at::IntArrayRef plan, bool telemetry, bool keep);

using SlotBackward = Gradients(const at::Tensor& dy, const std::optional<at::Tensor>& h,
                               const std::optional<at::Tensor>& x, at::TensorList params,
                               const at::Tensor& scalars, at::IntArrayRef plan,
                               at::IntArrayRef need, const std::optional<at::Tensor>& hidden);

// The arguments of slot_backward's `need`: dh, dx, then one for each tensor of params.
inline constexpr std::int64_t kNeedHost = 0;
inline constexpr std::int64_t kNeedInput = 1;
inline constexpr std::int64_t kNeedParams = 2;

void check_backward(const SlotCall& call, const at::Tensor& dy, const std::optional<at::Tensor>& h,
                    at::TensorList params, const std::optional<at::Tensor>& hidden, at::IntArrayRef need);

}  // namespace esper
