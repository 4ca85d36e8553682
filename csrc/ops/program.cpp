#include "ops/program.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <mutex>
#include <type_traits>

#include "ops/cpu.h"
#include "ops/slot.h"

namespace esper {
namespace {

using torch::autograd::Edge;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePointer = decltype(Edge::function);

// Whether the dispatcher would go from autograd straight to the CPU.
bool is_plain(c10::DispatchKeySet keys) {
  constexpr c10::DispatchKeySet kKnown({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                        c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU,
                                        c10::DispatchKey::BackendSelect});
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const auto left = (keys | local.included_) - local.excluded_;  // bits of functionalities and of backends
  return (left.raw_repr() & ~kKnown.raw_repr()) == 0;
}

// Whether nobody looks at a parameter's gradient on its way: no hook of it, nor of the node that accumulates it,
// where data parallelism hooks in.
bool is_unobserved(const at::Tensor& tensor) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(tensor);
  if (meta == nullptr) return true;
  if (meta->grad_fn_ != nullptr || !meta->hooks_.empty() || meta->post_acc_grad_hooks_ != nullptr) return false;
  const auto node = torch::autograd::impl::try_get_grad_accumulator(tensor);
  return node == nullptr || (node->pre_hooks().empty() && node->post_hooks().empty() &&
                             node->tensor_pre_hooks().empty());
}

// The gradient of one call. What it saves of the parameters is a reference and a version.
class SlotNode : public torch::autograd::Node {
 public:
  SlotNode(torch::autograd::edge_list&& edges, SlotCall&& call, std::vector<std::int64_t> plan,
           std::vector<at::Tensor>&& params, bool direct)
      : Node(std::move(edges)),
        call_(std::move(call)),
        plan_(std::move(plan)),
        params_(std::move(params)),
        direct_(direct) {
    versions_.reserve(params_.size());
    for (const auto& tensor : params_) versions_.push_back(version_of(tensor));
    if (!direct_) return;
    trains_.reserve(params_.size());
    for (const auto& tensor : params_) trains_.push_back(tensor.requires_grad());
  }

  // Any may be undefined.
  void save(const at::Tensor& h, const at::Tensor& x, const at::Tensor& hidden) {
    h_ = SavedVariable(h, false);
    x_ = SavedVariable(x, false);
    hidden_ = SavedVariable(hidden, false);
  }

  std::string name() const override { return "EsperSlotBackward"; }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    h_.reset_data();
    x_.reset_data();
    hidden_.reset_data();
    params_.clear();
    released_ = true;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard lock(mutex_);
    variable_list result(num_outputs());
    const auto& dy = grads[0];
    if (!dy.defined()) return result;
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    const auto need = needed();
    if (direct_) check_direct(dy, need);
    result[0] = dy;  // the identity path; nothing else where no seed sends to h
    if (std::none_of(need.begin(), need.end(), [](std::int64_t flag) { return flag != 0; })) return result;
    check_versions();
    auto [dh, dx, dparams] = gradients(dy, need);
    if (need[kNeedHost] != 0) result[0] = std::move(dh);
    if (need[kNeedInput] != 0) result[1] = std::move(dx);
    for (std::size_t p = 0; p < dparams.size(); ++p) {
      if (need[kNeedParams + p] == 0) continue;
      if (direct_) {
        accumulate(p, std::move(dparams[p]));
      } else {
        result[2 + p] = std::move(dparams[p]);
      }
    }
    return result;
  }

 private:
  static std::uint32_t version_of(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->version_counter().current_version();
  }

  void check_versions() const {
    for (std::size_t p = 0; p < params_.size(); ++p) {
      TORCH_CHECK(version_of(params_[p]) == versions_[p],
                  "one of the variables needed for gradient computation has been modified by an inplace "
                  "operation: params[", p, "] of a slot, ", params_[p].sizes(), ", is at version ",
                  version_of(params_[p]), "; expected version ", versions_[p], " instead");
    }
  }

  // Before anything has changed.
  void check_direct(const at::Tensor& dy, at::IntArrayRef need) const {
    TORCH_CHECK(!c10::GradMode::is_enabled() && is_plain(dy.key_set()),
                "a graph of the gradient is wanted (create_graph=True), or many gradients at once, which direct "
                "gradients of seeds do not have: turn them off");
    for (std::size_t p = 0; p < params_.size(); ++p) {
      TORCH_CHECK(need[kNeedParams + p] == 0 || is_unobserved(params_[p]), "params[", p, "] of a slot has got a hook "
                  "since forward, which direct gradients of seeds do not call: register hooks before forward, or "
                  "turn direct gradients off");
    }
  }

  std::vector<std::int64_t> needed() const {
    std::vector<std::int64_t> need(kNeedParams + params_.size());
    // Not empty where gradients of certain tensors are asked for, which are none of these.
    const auto* asked = torch::autograd::get_current_graph_task_exec_info();
    const bool all = asked == nullptr || asked->empty();
    for (const auto& seed : call_.seeds) {
      const bool input = seed.shape.source == Source::kInput;
      if (seed.scalars.gamma != 0.0f) need[input ? kNeedInput : kNeedHost] = 1;
      if (seed.scalars.alpha_bwd == 0.0f) continue;
      each_param<const float>(seed, [&](auto, std::size_t index, std::int64_t, std::int64_t) {
        need[kNeedParams + index] = direct_ ? all && trains_[index] : task_should_compute_output(2 + index);
      });
    }
    need[kNeedHost] &= static_cast<std::int64_t>(task_should_compute_output(0));
    need[kNeedInput] &= static_cast<std::int64_t>(task_should_compute_output(1));
    return need;
  }

  // As torch's own node does it, which would be executed for each parameter.
  void accumulate(std::size_t p, at::Tensor gradient) const {
    static std::mutex only;
    const std::lock_guard lock(only);
    auto& sum = params_[p].mutable_grad();
    if (sum.defined()) {
      sum.add_(gradient);
    } else {
      sum = std::move(gradient);
    }
  }

  Gradients gradients(const at::Tensor& dy, at::IntArrayRef need) const {
    const auto h = h_.unpack(), x = x_.unpack(), hidden = hidden_.unpack();
    const auto given = [](const at::Tensor& tensor) {
      return tensor.defined() ? std::optional(tensor) : std::nullopt;
    };
    auto keys = dy.key_set();
    for (const auto* saved : {&h, &x, &hidden}) {
      if (saved->defined()) keys = keys | saved->key_set();
    }
    if (!c10::GradMode::is_enabled() && is_plain(keys)) {
      RECORD_FUNCTION("esper::slot_backward", {});
      const at::AutoDispatchBelowADInplaceOrView below;
      return backward_on_cpu(call_, dy, given(h), given(x), params_, hidden, need, direct_);
    }
    // A graph of this gradient is wanted, or many gradients at once: the operator knows what it can do.
    static const auto backward =
        c10::Dispatcher::singleton().findSchemaOrThrow("esper::slot_backward", "").typed<SlotBackward>();
    const auto seeds = static_cast<std::int64_t>(call_.seeds.size());
    const auto scalars = at::empty({seeds, 3}, at::kFloat);
    auto* row = scalars.mutable_data_ptr<float>();
    auto plan = plan_;
    for (std::int64_t i = 0; i < seeds; ++i, row += 3) {
      const auto& values = call_.seeds[static_cast<std::size_t>(i)].scalars;
      row[0] = values.alpha_fwd, row[1] = values.alpha_bwd, row[2] = values.gamma;
      plan[static_cast<std::size_t>(i) * kPlanWidth + kPlanRow] = i;
    }
    return backward.call(dy, given(h), given(x), params_, scalars, plan, need, given(hidden));
  }

  std::mutex mutex_;
  SlotCall call_;
  std::vector<std::int64_t> plan_;
  std::vector<at::Tensor> params_;
  std::vector<std::uint32_t> versions_;
  bool direct_;               // whether parameters' gradients are accumulated here, and have no edges
  std::vector<bool> trains_;  // where they are: which parameters want one
  SavedVariable h_, x_, hidden_;
  bool released_ = false;
};

// Torch owns its nodes by std::shared_ptr or counts references inside of them, depending on its version.
template <class Pointer, class... Arguments>
Pointer make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<SlotNode>(std::forward<Arguments>(arguments)...);
  } else {
    return c10::make_intrusive<SlotNode>(std::forward<Arguments>(arguments)...);
  }
}

}  // namespace

std::optional<std::pair<at::Tensor, at::Tensor>> SlotProgram::run(const at::Tensor& h,
                                                                  const std::optional<at::Tensor>& x,
                                                                  std::vector<at::Tensor> params,
                                                                  const at::Tensor& scalars,
                                                                  bool telemetry, bool direct) const {
  auto keys = h.key_set();
  bool trains = h.requires_grad(), inference = h.is_inference();
  const auto look_at = [&](const at::Tensor& tensor) {
    keys = keys | tensor.key_set();
    trains |= tensor.requires_grad();
    inference |= tensor.is_inference();
  };
  if (x.has_value()) look_at(*x);
  bool fits = true;  // a seed in another type than its host is converted by whoever calls
  for (const auto& tensor : params) {
    look_at(tensor);
    fits &= tensor.scalar_type() == at::kFloat || tensor.scalar_type() == h.scalar_type();
  }
  trains &= c10::GradMode::is_enabled() &&
            !c10::impl::tls_local_dispatch_key_set().excluded_.has(c10::DispatchKey::AutogradCPU);
  if (!fits || !is_plain(keys | scalars.key_set()) || (trains && inference) ||
      torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr) {
    return std::nullopt;
  }
  RECORD_FUNCTION("esper::slot_forward", {});
  auto call = check_slot("h", h, x, params, scalars, plan_);
  const bool keep = trains && std::any_of(call.seeds.begin(), call.seeds.end(), [](const PlannedSeed& seed) {
                      return seed.scalars.alpha_fwd != 0.0f;
                    });
  const at::AutoDispatchBelowADInplaceOrView below;
  auto [y, stats, hidden] = forward_on_cpu(call, h, x, params, telemetry, keep);
  if (trains) {
    torch::autograd::edge_list edges;
    edges.reserve(2 + params.size());
    edges.push_back(torch::autograd::impl::gradient_edge(h));
    edges.push_back(x.has_value() ? torch::autograd::impl::gradient_edge(*x) : Edge());
    direct &= std::all_of(params.begin(), params.end(), is_unobserved);
    for (std::size_t p = 0; !direct && p < params.size(); ++p) {
      edges.push_back(torch::autograd::impl::gradient_edge(params[p]));
    }
    const auto saved_h = call.reads_output ? h : at::Tensor();
    const auto saved_x = call.input_width > 0 ? *x : at::Tensor();
    auto node = make_node<NodePointer>(std::move(edges), std::move(call), plan_, std::move(params), direct);
    static_cast<SlotNode&>(*node).save(saved_h, saved_x, hidden.numel() != 0 ? hidden : at::Tensor());
    torch::autograd::create_gradient_edge(y, std::move(node));
  }
  return std::pair(std::move(y), std::move(stats));
}

}  // namespace esper
