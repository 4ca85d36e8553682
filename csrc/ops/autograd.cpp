// Schemas of the operators and their gradient.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/select.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops/slot.h"

namespace esper {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
const c10::TypedOperatorHandle<Signature>& handle(const char* name) {
  static const auto found = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return found;
}

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

// Whether the values of a tensor can be read here: not while a graph is traced with fake tensors.
bool readable(const at::Tensor& tensor) {
  return tensor.device().is_cpu() && !tensor.unsafeGetTensorImpl()->is_python_dispatch() &&
         !tensor.key_set().has(c10::DispatchKey::Functionalize);
}

// A list of integers as one argument: autograd counts the elements of a plain list as arguments.
struct Plan {
  std::vector<std::int64_t> values;

  std::size_t seeds() const { return values.size() / kPlanWidth; }
  std::int64_t& at(std::size_t seed, std::size_t field) { return values[seed * kPlanWidth + field]; }
  bool any_reads(Source source) const {
    for (std::size_t i = 0; i < seeds(); ++i) {
      if (values[i * kPlanWidth + 3] == static_cast<std::int64_t>(source)) return true;
    }
    return false;
  }
};

// The rows of `scalars` that a plan names, as they are now; the bank may have moved on when backward runs.
at::Tensor snapshot(const at::Tensor& scalars, Plan& plan) {
  const auto seeds = static_cast<std::int64_t>(plan.seeds());
  at::Tensor rows = at::empty({seeds, 3}, scalars.options());
  if (readable(scalars) && readable(rows)) {  // an export traces with real scalars, but allocates fakes
    const auto* from = scalars.const_data_ptr<float>();
    auto* to = rows.mutable_data_ptr<float>();
    for (std::size_t i = 0; i < plan.seeds(); ++i) {
      std::copy_n(from + 3 * plan.at(i, 0), 3, to + 3 * i);
    }
  } else {
    std::vector<at::Tensor> picked;
    for (std::size_t i = 0; i < plan.seeds(); ++i) picked.push_back(at::select(scalars, 0, plan.at(i, 0)));
    if (!picked.empty()) rows = at::stack(picked);
  }
  for (std::size_t i = 0; i < plan.seeds(); ++i) plan.at(i, 0) = static_cast<std::int64_t>(i);
  return rows;
}

// Whether forward computes a hidden layer that backward may want: keeping it is faster than computing it again.
bool wants_hidden(const at::Tensor& h, const std::optional<at::Tensor>& x, at::TensorList params,
                  const at::Tensor& scalars, Plan& plan) {
  const auto trains = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  if (!at::GradMode::is_enabled() || !(trains(h) || (x.has_value() && trains(*x)) ||
                                       std::any_of(params.begin(), params.end(), trains))) {
    return false;
  }
  if (!readable(scalars)) return true;  // traced: a blending seed may come
  const auto* alpha = scalars.const_data_ptr<float>();
  for (std::size_t i = 0; i < plan.seeds(); ++i) {
    const auto row = plan.at(i, 0);
    if (row >= 0 && 3 * row < scalars.numel() && alpha[3 * row] != 0.0f) return true;
  }
  return false;
}

class SlotFunction : public torch::autograd::Function<SlotFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& h,
                               const std::optional<at::Tensor>& x, at::TensorList params,
                               const at::Tensor& scalars, const Plan& plan, bool telemetry, bool keep) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, stats, hidden] =
        handle<SlotForward>("esper::slot_forward").call(h, x, params, scalars, plan.values, telemetry, keep);
    Plan own = plan;
    const bool has_input = x.has_value() && x->defined();
    variable_list saved{own.any_reads(Source::kOutput) ? h : at::Tensor(),
                        has_input && own.any_reads(Source::kInput) ? *x : at::Tensor(),
                        snapshot(scalars, own), hidden.sym_numel() != 0 ? hidden : at::Tensor()};
    saved.insert(saved.end(), params.begin(), params.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["plan"] = std::move(own.values);
    ctx->saved_data["has_input"] = has_input;
    ctx->mark_non_differentiable({stats, hidden});
    ctx->set_materialize_grads(false);
    return {std::move(y), std::move(stats), std::move(hidden)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Plan plan{ctx->saved_data["plan"].toIntVector()};
    const bool has_input = ctx->saved_data["has_input"].toBool();
    const auto &h = saved[0], &x = saved[1], &scalars = saved[2], &hidden = saved[3];
    const at::TensorList params(saved.data() + 4, saved.size() - 4);
    // One for each argument of forward: h, x, params, scalars, plan, telemetry, keep.
    variable_list result(2 + params.size() + 4);
    const auto& dy = grads[0];
    if (!dy.defined()) return result;

    // Edges exist for tensors only, so an absent x has none.
    const std::size_t first_param = has_input ? 2 : 1;
    std::vector<std::int64_t> need(kNeedParams + params.size());
    bool sends_host = false, sends_input = false;
    const auto needs_param = [&](std::size_t p) { return ctx->needs_input_grad(first_param + p); };
    if (readable(scalars)) {
      const auto* row = scalars.const_data_ptr<float>();
      for (std::size_t i = 0; i < plan.seeds(); ++i, row += 3) {
        const auto* record = plan.values.data() + i * kPlanWidth;
        (record[3] == static_cast<std::int64_t>(Source::kInput) ? sends_input : sends_host) |= row[2] != 0;
        const auto end = i + 1 < plan.seeds() ? static_cast<std::size_t>(record[kPlanWidth + 8])
                                              : params.size();
        for (auto p = static_cast<std::size_t>(record[8]); row[1] != 0 && p < end; ++p) {
          need[kNeedParams + p] = needs_param(p);
        }
      }
    } else {  // traced: the graph must hold for every later value of the scalars
      sends_host = h.defined();
      sends_input = x.defined();
      for (std::size_t p = 0; p < params.size(); ++p) need[kNeedParams + p] = needs_param(p);
    }
    need[kNeedHost] = sends_host && ctx->needs_input_grad(0);
    need[kNeedInput] = sends_input && ctx->needs_input_grad(1);
    result[0] = dy;  // the identity path; nothing else where no seed sends to h
    if (std::any_of(need.begin(), need.end(), [](std::int64_t flag) { return flag != 0; })) {
      auto [dh, dx, dparams] = handle<SlotBackward>("esper::slot_backward")
                                   .call(dy, if_defined(h), if_defined(x), params, scalars, plan.values,
                                         need, if_defined(hidden));
      if (need[kNeedHost]) result[0] = std::move(dh);
      if (need[kNeedInput]) result[1] = std::move(dx);
      for (std::size_t p = 0; p < params.size(); ++p) {
        if (need[kNeedParams + p]) result[2 + p] = std::move(dparams[p]);
      }
    }
    return result;
  }
};

Outputs slot_forward_autograd(const at::Tensor& h, const std::optional<at::Tensor>& x, at::TensorList params,
                              const at::Tensor& scalars, at::IntArrayRef plan, bool telemetry, bool keep) {
  Plan own{plan.vec()};
  keep |= wants_hidden(h, x, params, scalars, own);
  auto outputs = SlotFunction::apply(h, x, params, scalars, own, telemetry, keep);
  return {std::move(outputs[0]), std::move(outputs[1]), std::move(outputs[2])};
}

}  // namespace

TORCH_LIBRARY(esper, m) {
  m.def(
      "slot_forward(Tensor h, Tensor? x, Tensor[] params, Tensor scalars, int[] plan, bool telemetry, "
      "bool keep=False) -> (Tensor y, Tensor stats, Tensor hidden)");
  m.def(
      "slot_backward(Tensor dy, Tensor? h, Tensor? x, Tensor[] params, Tensor scalars, int[] plan, "
      "int[] need, Tensor? hidden=None) -> (Tensor dh, Tensor dx, Tensor[] dparams)");
}

TORCH_LIBRARY_IMPL(esper, Autograd, m) {
  m.impl("slot_forward", &slot_forward_autograd);
  // A second derivative is refused instead of being silently zero.
  m.impl("slot_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace esper
