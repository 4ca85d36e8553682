#include <ATen/core/Tensor.h>
#include <ATen/ops/movedim.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "ops/slot.h"

namespace esper {
namespace {

// One record of the plan, read field by field.
class Record {
 public:
  Record(at::IntArrayRef plan, std::size_t seed)
      : values_(plan.slice(seed * kPlanWidth, kPlanWidth)), seed_(seed) {}

  std::int64_t in(std::size_t field, std::int64_t low, std::int64_t high) const {
    TORCH_CHECK_VALUE(values_[field] >= low && values_[field] < high, "plan: ", kPlanFields[field],
                      " of seed ", seed_, " is ", values_[field], " but must be in [", low, ", ", high,
                      ")");
    return values_[field];
  }

 private:
  at::IntArrayRef values_;
  std::size_t seed_;
};

constexpr const char* kScalarNames[] = {"alpha_fwd", "alpha_bwd", "gamma"};

bool floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& host) {
  TORCH_CHECK_VALUE(floating(tensor.scalar_type()), name, " is of type ", tensor.scalar_type(),
                    " but must be float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(tensor.device() == host.device(), name, " is on ", tensor.device(),
                    " but the host's tensors are on ", host.device());
}

void check_param(const char* name, std::size_t seed, std::int64_t index, at::TensorList params,
                 at::IntArrayRef shape, const at::Tensor& host) {
  if (index < 0) return;
  const auto& tensor = params[static_cast<std::size_t>(index)];
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "params[", index, "] (", name, " of seed ", seed,
                    ") has shape ", tensor.sizes(), " but must be ", shape);
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == host.scalar_type(),
                    "params[", index, "] (", name, " of seed ", seed, ") is of type ",
                    tensor.scalar_type(), " but must be float32 or the host's ", host.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == host.device(), "params[", index, "] is on ", tensor.device(),
                    " but the host's tensors are on ", host.device());
}

// [first, second] and an axis of `window` for each position axis of the host, as a convolution has it.
std::vector<std::int64_t> conv_shape(std::int64_t first, std::int64_t second, std::int64_t window,
                                     const at::Tensor& host) {
  std::vector<std::int64_t> shape{first, second};
  shape.resize(static_cast<std::size_t>(host.dim()), window);
  return shape;
}

// A spatial seed works on samples of one or two position axes; one that reads x needs x to have the same.
void check_positions(std::size_t seed, const char* host_name, const at::Tensor& host,
                     const at::Tensor* x) {
  TORCH_CHECK_VALUE(host.dim() == 3 || host.dim() == 4, "seed ", seed, " works on positions but ",
                    host_name, " has shape ", host.sizes(),
                    " and must be [samples, T, D] or [samples, H, W, D]");
  TORCH_CHECK_VALUE(x == nullptr || x->sizes().slice(0, static_cast<std::size_t>(x->dim() - 1)) ==
                                        host.sizes().slice(0, static_cast<std::size_t>(host.dim() - 1)),
                    "seed ", seed, " works on the positions of x but x has shape ", x->sizes(), " and ",
                    host_name, " has ", host.sizes());
}

}  // namespace

SlotCall check_slot(const char* host_name, const at::Tensor& host, const std::optional<at::Tensor>& x,
                    at::TensorList params, const at::Tensor& scalars, at::IntArrayRef plan) {
  SlotCall call{};
  TORCH_CHECK_VALUE(host.dim() >= 1, host_name, " is a scalar but must be [..., D]");
  check_tensor(host_name, host, host);
  call.compute_type = host.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  call.width = host.size(-1);
  TORCH_CHECK_VALUE(call.width >= 1, host_name, " has no features: its shape is ", host.sizes());
  call.tokens = host.numel() / call.width;
  if (host.dim() >= 3) {
    call.positions = {host.size(0), host.size(1), host.dim() == 4 ? host.size(2) : 1};
  }

  TORCH_CHECK_VALUE(scalars.dim() == 2 && scalars.size(1) == 3 && scalars.scalar_type() == at::kFloat &&
                        scalars.device().is_cpu() && scalars.is_contiguous(),
                    "scalars is ", scalars.scalar_type(), " ", scalars.sizes(), " on ", scalars.device(),
                    " but must be a contiguous float32 [rows, 3] on the CPU");
  TORCH_CHECK_VALUE(plan.size() % kPlanWidth == 0, "plan has ", plan.size(),
                    " integers but must have ", kPlanWidth, " for each seed");
  const bool has_input = x.has_value() && x->defined();
  std::int64_t input_width = 0;
  if (has_input) {
    check_tensor("x", *x, host);
    TORCH_CHECK_VALUE(x->dim() >= 1 && x->size(-1) >= 1, "x has shape ", x->sizes(),
                      " but must be [..., D_in]");
    input_width = x->size(-1);
    TORCH_CHECK_VALUE(x->numel() / input_width == call.tokens, "x has ", x->numel() / input_width,
                      " tokens (shape ", x->sizes(), ") but ", host_name, " has ", call.tokens,
                      " (shape ", host.sizes(), ")");
  }

  const auto seeds = plan.size() / kPlanWidth;
  call.seeds.resize(seeds);
  std::int64_t next_column = 0;
  std::int64_t next_param = 0;
  const auto* rows = scalars.const_data_ptr<float>();
  for (std::size_t i = 0; i < seeds; ++i) {
    const Record record(plan, i);
    auto& [shape, seed_scalars, index, hidden] = call.seeds[i];
    const float* row = rows + 3 * record.in(0, 0, scalars.size(0));
    for (std::size_t k = 0; k < 3; ++k) {
      TORCH_CHECK_VALUE(row[k] >= 0.0f && row[k] <= 1.0f, "scalars: ", kScalarNames[k], " of seed ", i,
                        " is ", row[k], " but must be in [0, 1]");
    }
    seed_scalars = {row[0], row[1], row[2]};
    shape.offset = record.in(1, next_column, call.width);
    shape.width = record.in(2, 1, call.width - shape.offset + 1);
    next_column = shape.offset + shape.width;
    shape.source = static_cast<Source>(record.in(3, 0, 2));
    shape.family = static_cast<Family>(record.in(4, 0, kNumFamilies));
    const bool input = shape.source == Source::kInput;
    const bool affine = shape.family == Family::kAffine;
    const bool squeezes = shape.family == Family::kSqueezeExcite;
    const bool depthwise = shape.family == Family::kDepthwise;
    TORCH_CHECK_VALUE(!input || has_input, "x is missing but seed ", i, " reads the slot's input");
    shape.source_width = input ? input_width : shape.width;
    if (input) {
      call.input_width = input_width;
    } else {
      call.reads_output = true;
    }
    shape.activation = static_cast<Activation>(record.in(5, 0, affine ? 1 : kNumActivations));
    shape.gated = record.in(6, 0, shape.family == Family::kBottleneck ? 2 : 1) != 0;
    if (depthwise) {
      shape.rank = record.in(7, shape.source_width, shape.source_width + 1);
    } else {
      shape.rank = record.in(7, affine ? 0 : 1, affine ? 1 : INT32_MAX);
    }
    TORCH_CHECK_VALUE(!(affine || squeezes) || shape.source_width == shape.width, "plan: ",
                      affine ? "affine" : "squeeze-excite", " seed ", i, " reads ", shape.source_width,
                      " features but its chunk has ", shape.width);
    hidden = call.hidden_width;
    if (shape.family == Family::kBottleneck) call.hidden_width += shape.rank * (shape.gated ? 2 : 1);
    const auto window = record.in(10, depthwise ? 1 : 0, depthwise ? kMaxWindow + 1 : 1);
    TORCH_CHECK_VALUE(!depthwise || window % 2 == 1, "plan: window of seed ", i, " is ", window,
                      " but must be odd");
    const bool spatial = is_spatial(shape.family);
    if (spatial) check_positions(i, host_name, host, input ? &*x : nullptr);
    if (depthwise) {
      shape.window_height = window;
      shape.window_width = host.dim() == 4 ? window : 1;
    }

    next_param = record.in(8, next_param, next_param + 1);
    const auto biases = record.in(9, 0, 8);
    const auto take = [&next_param](bool present) { return present ? next_param++ : -1; };
    TORCH_CHECK_VALUE((!affine || (biases & ~kBiasOutput) == 0) && (shape.gated || !(biases & kBiasGate)),
                      "plan: biases of seed ", i, " is ", biases,
                      " but names the bias of a part that the seed does not have");
    index.A = take(!affine);
    index.a = take((biases & kBiasHidden) != 0);
    index.G = take(shape.gated);
    index.c = take((biases & kBiasGate) != 0);
    index.B = take(true);
    index.b = take((biases & kBiasOutput) != 0);
    TORCH_CHECK_VALUE(next_param <= static_cast<std::int64_t>(params.size()), "params has ",
                      params.size(), " tensors but seed ", i, " needs those up to index ",
                      next_param - 1);
    const auto S = shape.source_width, r = shape.rank, d = shape.width;
    if (spatial) {
      const auto first = depthwise ? conv_shape(S, 1, window, host) : conv_shape(r, S, 1, host);
      check_param("A", i, index.A, params, first, host);
    } else {
      check_param("A", i, index.A, params, {S, r}, host);
    }
    check_param("a", i, index.a, params, {r}, host);
    check_param("G", i, index.G, params, {S, r}, host);
    check_param("c", i, index.c, params, {r}, host);
    if (affine) {
      check_param("w", i, index.B, params, {d}, host);
    } else if (spatial) {
      check_param("B", i, index.B, params, conv_shape(d, r, 1, host), host);
    } else {
      check_param("B", i, index.B, params, {r, d}, host);
    }
    check_param("b", i, index.b, params, {d}, host);
  }
  TORCH_CHECK_VALUE(next_param == static_cast<std::int64_t>(params.size()), "params has ", params.size(),
                    " tensors but the plan names ", next_param);
  return call;
}

void check_backward(const SlotCall& call, const at::Tensor& dy, const std::optional<at::Tensor>& h,
                    at::TensorList params, const std::optional<at::Tensor>& hidden, at::IntArrayRef need) {
  TORCH_CHECK_VALUE(need.size() == kNeedParams + params.size(), "need has ", need.size(),
                    " flags but must have ", kNeedParams + params.size());
  const bool has_host = h.has_value() && h->defined();
  TORCH_CHECK_VALUE(has_host || !call.reads_output, "h is missing but a seed reads the slot's output");
  if (has_host) {
    check_tensor("h", *h, dy);
    TORCH_CHECK_VALUE(h->sizes() == dy.sizes() && h->scalar_type() == dy.scalar_type(), "h is ",
                      h->scalar_type(), " ", h->sizes(), " but dy is ", dy.scalar_type(), " ",
                      dy.sizes());
  }
  if (hidden.has_value() && hidden->defined()) {
    const auto elements = call.tokens * call.hidden_width;
    TORCH_CHECK_VALUE(hidden->dim() == 1 && hidden->numel() == elements && hidden->scalar_type() == call.compute_type &&
                          hidden->is_contiguous() && hidden->device() == dy.device(),
                      "hidden is ", hidden->scalar_type(), " ", hidden->sizes(), " on ", hidden->device(),
                      " but must be a contiguous ", call.compute_type, " [", elements, "] on ", dy.device());
  }
}

bool any_spatial(const SlotCall& call) {
  return std::any_of(call.seeds.begin(), call.seeds.end(),
                     [](const PlannedSeed& seed) { return is_spatial(seed.shape.family); });
}

bool in_planes(const at::Tensor& tensor) {
  return !tensor.is_contiguous() && tensor.dim() >= 3 && at::movedim(tensor, -1, 1).is_contiguous();
}

at::Tensor laid_out(const at::Tensor& tensor, at::ScalarType type, bool planes) {
  if (!planes) return as_operand(tensor, type);
  return at::movedim(as_operand(at::movedim(tensor, -1, 1), type), 1, -1);
}

at::Tensor as_operand(const at::Tensor& tensor, at::ScalarType type) {
  if (tensor.scalar_type() == type && tensor.is_contiguous()) return tensor;
  return tensor.to(type).contiguous();
}

}  // namespace esper
