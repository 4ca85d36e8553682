// The operators on CUDA. Compiled and registered with a CPU build of torch as well, which proves that it
// links; nothing here needs a symbol of the CUDA libraries of torch unless torch has them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#if __has_include(<c10/cuda/impl/cuda_cmake_macros.h>)
#include <c10/cuda/CUDAStream.h>
#else
#include <c10/core/impl/VirtualGuardImpl.h>
#endif

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/cuda/slot.h"
#include "ops/cuda_fused.h"
#include "ops/slot.h"

namespace esper {
namespace {

void* current_stream(c10::Device device) {
#if __has_include(<c10/cuda/impl/cuda_cmake_macros.h>)
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
#else
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
#endif
}

void check_launch(const char* error) { TORCH_CHECK(error == nullptr, "esper CUDA kernel: ", error); }

// What the launchers of all seeds of a call share.
template <class T>
struct Operands {
  std::vector<at::Tensor> owned;  // params, in the type of the kernels
  at::Tensor h, x, before, gate, hidden, g, energy, vectors, trust;
  void* stream;

  Operands(const SlotCall& call, const at::Tensor& host, const std::optional<at::Tensor>& h_given,
           const std::optional<at::Tensor>& x_given, at::TensorList params)
      : stream(current_stream(host.device())) {
    if (h_given.has_value() && h_given->defined()) h = as_operand(*h_given, call.compute_type);
    if (call.input_width > 0) x = as_operand(*x_given, call.compute_type);
    for (const auto& tensor : params) owned.push_back(as_operand(tensor, call.compute_type));
    std::int64_t rank = 0, width = 0;
    for (const auto& seed : call.seeds) {
      rank = std::max(rank, seed.shape.rank);
      width = std::max(width, seed.shape.width);
    }
    const auto options = host.options().dtype(call.compute_type);
    for (auto* tile : {&before, &gate, &hidden}) *tile = at::empty({call.tokens, rank}, options);
    g = at::empty({call.tokens, width}, options);
    energy = at::empty({call.tokens}, options.dtype(at::kDouble));
    vectors = at::empty({3, call.positions.samples, width}, options);
    trust = at::empty({call.positions.samples}, options.dtype(at::kDouble));
  }

  cuda::SeedCall<T> seed(const SlotCall& call, std::size_t i) {
    cuda::SeedCall<T> result;
    result.shape = call.seeds[i].shape;
    result.scalars = call.seeds[i].scalars;
    each_param<const T>(call.seeds[i], [&](auto member, std::size_t index, std::int64_t, std::int64_t) {
      result.params.*member = owned[index].template const_data_ptr<T>();
    });
    result.tokens = call.tokens;
    result.width = call.width;
    result.input_width = call.input_width;
    if (h.defined()) result.h = h.template const_data_ptr<T>();
    if (x.defined()) result.x = x.template const_data_ptr<T>();
    result.before = before.template mutable_data_ptr<T>();
    result.gate = gate.template mutable_data_ptr<T>();
    result.hidden = hidden.template mutable_data_ptr<T>();
    result.g = g.template mutable_data_ptr<T>();
    result.energy = energy.template mutable_data_ptr<double>();
    result.positions = call.positions;
    result.vectors = vectors.template mutable_data_ptr<T>();
    result.trust = trust.template mutable_data_ptr<double>();
    return result;
  }
};

// The seeds of a call that a test picks.
template <class Test>
std::vector<std::size_t> at_work(const SlotCall& call, Test test) {
  std::vector<std::size_t> result;
  for (std::size_t i = 0; i < call.seeds.size(); ++i) {
    if (test(i)) result.push_back(i);
  }
  return result;
}

template <class T>
Outputs forward(const SlotCall& call, const at::Tensor& h, const std::optional<at::Tensor>& x,
                at::TensorList params, bool telemetry) {
  const FusedSeeds fused(call, h, params, current_stream(h.device()));
  auto stats = at::zeros({telemetry ? static_cast<std::int64_t>(call.seeds.size()) : 0, kNumStats},
                         h.options().dtype(at::kDouble));
  const auto others = at_work(call, [&](std::size_t i) {
    return !fused.takes(i) && call.tokens > 0 && (call.seeds[i].scalars.alpha_fwd != 0.0f || telemetry);
  });
  const bool planes = any_spatial(call) && in_planes(h);
  const auto host = h.contiguous();
  auto y = fused.write_all(false, false) ? at::empty(host.sizes(), host.options()) : host.clone();
  if (!others.empty()) {
    Operands<T> operands(call, h, h, x, params);
    auto wide = operands.h.clone();
    for (const auto i : others) {
      auto* row = telemetry ? reinterpret_cast<ChunkStats*>(stats.template mutable_data_ptr<double>()) + i : nullptr;
      check_launch(
          cuda::forward<T>(operands.seed(call, i), wide.template mutable_data_ptr<T>(), row, operands.stream));
    }
    y = wide.to(h.scalar_type());
  }
  fused.forward(host, x, y, stats);
  // Nothing is kept: arithmetic is cheaper than memory here, so that backward computes the hidden layer again.
  return {laid_out(y, h.scalar_type(), planes), std::move(stats), at::empty({0}, h.options().dtype(call.compute_type))};
}

template <class T>
Gradients backward(const SlotCall& call, const at::Tensor& dy, const std::optional<at::Tensor>& h,
                   const std::optional<at::Tensor>& x, at::TensorList params, at::IntArrayRef need) {
  const FusedSeeds fused(call, dy, params, current_stream(dy.device()));
  const bool need_dh = need[kNeedHost] != 0;
  const bool need_dx = need[kNeedInput] != 0 && call.input_width > 0;
  const auto host = dy.contiguous();
  at::Tensor dh, dx;  // undefined where not wanted
  if (need_dx) dx = at::zeros(x->sizes(), x->options());
  std::vector<at::Tensor> dparams(params.size());
  const auto others = at_work(call, [&](std::size_t i) { return !fused.takes(i); });
  if (others.empty()) {
    if (need_dh) dh = fused.write_all(true, true) ? at::empty(host.sizes(), host.options()) : host.clone();
  } else {
    Operands<T> operands(call, dy, h, x, params);
    const auto grad = as_operand(dy, call.compute_type);
    auto wide_dh = need_dh ? grad.clone() : at::Tensor();
    auto wide_dx = need_dx ? at::zeros(x->sizes(), grad.options()) : at::Tensor();
    for (const auto i : others) {
      const auto& seed = call.seeds[i];
      auto& sent = seed.shape.source == Source::kInput ? wide_dx : wide_dh;
      cuda::SeedGrads<T> grads;
      grads.dy = grad.template const_data_ptr<T>();
      if (seed.scalars.gamma != 0.0f && sent.defined()) grads.dsource = sent.template mutable_data_ptr<T>();
      bool wanted = grads.dsource != nullptr;
      each_param<T>(seed, [&](auto member, std::size_t index, std::int64_t, std::int64_t) {
        const bool needed = need[kNeedParams + index] != 0;
        auto& to = dparams[index];
        to = at::zeros(needed ? params[index].sizes() : at::IntArrayRef{0}, grad.options());
        if (!needed || seed.scalars.alpha_bwd == 0.0f) return;
        grads.params.*member = to.template mutable_data_ptr<T>();
        wanted = true;
      });
      if (wanted && call.tokens > 0) {
        check_launch(cuda::backward<T>(operands.seed(call, i), grads, operands.stream));
      }
    }
    if (need_dh) dh = wide_dh.to(dy.scalar_type());
    if (need_dx) dx = wide_dx.to(x->scalar_type());
  }
  fused.backward(host, h, x, need, need_dh && !fused.write_all(true, true) ? dh : host, dh, dx, dparams);
  for (std::size_t p = 0; p < params.size(); ++p) dparams[p] = dparams[p].to(params[p].scalar_type());
  const bool planes = any_spatial(call) && in_planes(call.reads_output ? *h : dy);
  return {need_dh ? laid_out(dh, dy.scalar_type(), planes) : at::empty({0}, dy.options()),
          need_dx ? laid_out(dx, x->scalar_type(), planes) : at::empty({0}, dy.options()), std::move(dparams)};
}

Outputs slot_forward_cuda(const at::Tensor& h, const std::optional<at::Tensor>& x, at::TensorList params,
                          const at::Tensor& scalars, at::IntArrayRef plan, bool telemetry, bool /*keep*/) {
  const auto call = check_slot("h", h, x, params, scalars, plan);
  const c10::DeviceGuard guard(h.device());
  return call.compute_type == at::kDouble ? forward<double>(call, h, x, params, telemetry)
                                          : forward<float>(call, h, x, params, telemetry);
}

Gradients slot_backward_cuda(const at::Tensor& dy, const std::optional<at::Tensor>& h,
                             const std::optional<at::Tensor>& x, at::TensorList params,
                             const at::Tensor& scalars, at::IntArrayRef plan,
                             at::IntArrayRef need, const std::optional<at::Tensor>& hidden) {
  const auto call = check_slot("dy", dy, x, params, scalars, plan);
  check_backward(call, dy, h, params, hidden, need);
  const c10::DeviceGuard guard(dy.device());
  return call.compute_type == at::kDouble ? backward<double>(call, dy, h, x, params, need)
                                          : backward<float>(call, dy, h, x, params, need);
}

}  // namespace

TORCH_LIBRARY_IMPL(esper, CUDA, m) {
  m.impl("slot_forward", &slot_forward_cuda);
  m.impl("slot_backward", &slot_backward_cuda);
}

}  // namespace esper
