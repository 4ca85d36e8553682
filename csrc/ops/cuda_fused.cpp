#include "ops/cuda_fused.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

namespace esper {
namespace {

void check_launch(const char* error) { TORCH_CHECK(error == nullptr, "esper CUDA kernel: ", error); }

std::optional<cuda::FusedElement> element_of(at::ScalarType type) {
  if (type == at::kBFloat16) return cuda::FusedElement::kBFloat16;
  if (type == at::kHalf) return cuda::FusedElement::kHalf;
  // What torch does with its own products is what a user has decided for ours.
  if (type == at::kFloat && at::globalContext().allowTF32CuBLAS()) return cuda::FusedElement::kTf32;
  return std::nullopt;
}

}  // namespace

FusedSeeds::FusedSeeds(const SlotCall& call, const at::Tensor& host, at::TensorList params, void* stream)
    : call_(call), stream_(stream), taken_(call.seeds.size(), false) {
  const auto element = element_of(host.scalar_type());
  if (!element.has_value() || call.tokens == 0) return;
  element_ = *element;
  params_.resize(params.size());
  for (std::size_t i = 0; i < call.seeds.size(); ++i) {
    taken_[i] = cuda::fuses(call.seeds[i].shape);
    if (!taken_[i]) continue;
    each_param<const float>(call.seeds[i], [&](auto, std::size_t index, std::int64_t, std::int64_t) {
      params_[index] = as_operand(params[index], at::kFloat);
    });
  }
}

bool FusedSeeds::sends(std::size_t i, bool need_dh, bool need_dx) const {
  const auto& seed = call_.seeds[i];
  return seed.scalars.gamma != 0.0f && (seed.shape.source == Source::kInput ? need_dx : need_dh);
}

bool FusedSeeds::write_all(bool backward, bool need_dh) const {
  std::int64_t written = 0;
  for (std::size_t i = 0; i < taken_.size(); ++i) {
    const auto& seed = call_.seeds[i];
    const bool writes = backward ? seed.shape.source == Source::kOutput && sends(i, need_dh, false)
                                 : seed.scalars.alpha_fwd != 0.0f;
    if (taken_[i] && writes) written += seed.shape.width;
  }
  return written == call_.width;
}

cuda::FusedCall FusedSeeds::empty_call() const {
  cuda::FusedCall result;
  result.element = element_;
  result.tokens = call_.tokens;
  result.width = call_.width;
  result.input_width = call_.input_width;
  return result;
}

cuda::FusedSeed FusedSeeds::seed(std::size_t i) const {
  cuda::FusedSeed result;
  result.shape = call_.seeds[i].shape;
  result.scalars = call_.seeds[i].scalars;
  each_param<const float>(call_.seeds[i], [&](auto member, std::size_t index, std::int64_t, std::int64_t) {
    result.params.*member = params_[index].const_data_ptr<float>();
  });
  return result;
}

void FusedSeeds::forward(const at::Tensor& h, const std::optional<at::Tensor>& x, at::Tensor& y,
                         at::Tensor& stats) const {
  const bool telemetry = stats.size(0) > 0;
  const at::Tensor input = call_.input_width > 0 ? x->contiguous() : at::Tensor();
  std::vector<at::Tensor> energies;
  auto call = empty_call();
  call.h = h.const_data_ptr();
  call.x = input.defined() ? input.const_data_ptr() : nullptr;
  call.y = y.mutable_data_ptr();
  const auto launch = [&] {
    check_launch(cuda::fused_forward(call, stream_));
    call.num_seeds = 0;
  };
  for (std::size_t i = 0; i < taken_.size(); ++i) {
    const bool writes = call_.seeds[i].scalars.alpha_fwd != 0.0f;
    if (!taken_[i] || (!writes && !telemetry)) continue;
    auto next = seed(i);
    next.writes = writes;
    if (telemetry) {
      energies.push_back(at::empty({call_.tokens}, stats.options()));
      next.energy = energies.back().mutable_data_ptr<double>();
    }
    call.seeds[call.num_seeds++] = next;
    if (call.num_seeds == cuda::kMaxFusedSeeds) launch();
  }
  if (call.num_seeds > 0) launch();
  if (!telemetry) return;
  auto partial = at::empty({cuda::token_blocks(call_.tokens), kNumStats}, stats.options());
  auto energy = energies.begin();
  for (std::size_t i = 0; i < taken_.size(); ++i) {
    if (!taken_[i]) continue;
    check_launch(cuda::chunk_stats(element_, call.h, call_.tokens, call_.width, call_.seeds[i].shape,
                                   energy->const_data_ptr<double>(),
                                   reinterpret_cast<ChunkStats*>(partial.mutable_data_ptr<double>()),
                                   reinterpret_cast<ChunkStats*>(stats.mutable_data_ptr<double>()) + i, stream_));
    ++energy;
  }
}

void FusedSeeds::backward(const at::Tensor& dy, const std::optional<at::Tensor>& h,
                          const std::optional<at::Tensor>& x, at::IntArrayRef need, const at::Tensor& dh_base,
                          at::Tensor& dh, at::Tensor& dx, std::vector<at::Tensor>& dparams) const {
  const at::Tensor read = call_.reads_output ? h->contiguous() : at::Tensor();
  const at::Tensor input = call_.input_width > 0 ? x->contiguous() : at::Tensor();
  const auto options = dy.options().dtype(at::kFloat);
  std::vector<at::Tensor> partials;
  auto call = empty_call();
  call.h = read.defined() ? read.const_data_ptr() : nullptr;
  call.x = input.defined() ? input.const_data_ptr() : nullptr;
  call.dy = dy.const_data_ptr();
  call.dh_base = dh_base.const_data_ptr();
  call.dh = dh.defined() ? dh.mutable_data_ptr() : nullptr;
  call.dx = dx.defined() ? dx.mutable_data_ptr() : nullptr;
  bool has_input_sender = false;
  const auto launch = [&] {
    if (call.num_seeds > 0) check_launch(cuda::fused_backward(call, stream_));
    call.num_seeds = 0;
    has_input_sender = false;
  };
  for (std::size_t i = 0; i < taken_.size(); ++i) {
    if (!taken_[i]) continue;
    auto next = seed(i);
    next.sends = sends(i, dh.defined(), dx.defined());
    bool wanted = next.sends;
    each_param<float>(call_.seeds[i], [&](auto member, std::size_t index, std::int64_t, std::int64_t) {
      const bool needed = need[kNeedParams + index] != 0;
      auto& to = dparams[index];
      to = at::zeros(needed ? params_[index].sizes() : at::IntArrayRef{0}, options);
      if (!needed || next.scalars.alpha_bwd == 0.0f) return;
      next.grads.*member = to.mutable_data_ptr<float>();
      wanted = true;
    });
    if (!wanted) continue;
    const bool input_sender = next.sends && next.shape.source == Source::kInput;
    if (call.num_seeds == cuda::kMaxFusedSeeds || (input_sender && has_input_sender)) launch();
    has_input_sender = has_input_sender || input_sender;
    partials.push_back(at::zeros({cuda::token_blocks(call_.tokens), cuda::partial_size(next.shape)}, options));
    next.partial = partials.back().mutable_data_ptr<float>();
    call.seeds[call.num_seeds++] = next;
  }
  launch();
}

}  // namespace esper
