#include "ops/large.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace esper {
namespace {

// Tokens at once: enough for the BLAS's own blocks, few enough that memory does not grow with the call.
constexpr std::int64_t kRows = 512;

// Any element that is not finite makes a sum so; where only the sum overflows, the elements are asked.
bool all_finite(const at::Tensor& tensor) {
  return std::isfinite(tensor.sum().item<double>()) || tensor.isfinite().all().item<bool>();
}

// [tokens, features] of columns of a tensor in the type that is computed in; a copy only where it must be.
at::Tensor rows_of(const at::Tensor& tensor, at::ScalarType type, std::int64_t tokens, std::int64_t offset,
                   std::int64_t width) {
  return tensor.to(type).reshape({tokens, tensor.size(-1)}).narrow(1, offset, width);
}

// One large seed of a call, with its parameters; undefined where it has none.
struct Large {
  const SeedShape& shape;
  const SeedScalars& scalars;
  std::int64_t tokens;
  at::Tensor A, a, G, c, B, b;
  at::Tensor kept_before, kept_gate;  // [tokens, r] of pre-activations; undefined where they are not kept
  bool broken = false;  // any parameter is not finite: every token is contained

  Large(const SlotCall& call, const PlannedSeed& seed, at::TensorList params, const at::Tensor& hidden)
      : shape(seed.shape), scalars(seed.scalars), tokens(call.tokens) {
    if (hidden.defined() && scalars.alpha_fwd != 0.0f) {
      const auto kept = [&](std::int64_t before) {
        return hidden.narrow(0, before * tokens, shape.rank * tokens).view({tokens, shape.rank});
      };
      kept_before = kept(seed.hidden);
      if (shape.gated) kept_gate = kept(seed.hidden + shape.rank);
    }
    const auto take = [&](std::int64_t index) {
      if (index < 0) return at::Tensor();
      const auto& tensor = params[static_cast<std::size_t>(index)];
      broken |= !all_finite(tensor);
      return tensor;
    };
    const auto& p = seed.params;
    A = take(p.A), a = take(p.a), G = take(p.G), c = take(p.c), B = take(p.B), b = take(p.b);
  }

  at::ScalarType type() const { return A.scalar_type(); }

  at::Tensor source(const at::Tensor& h, const std::optional<at::Tensor>& x) const {
    return shape.source == Source::kInput ? rows_of(*x, type(), tokens, 0, shape.source_width)
                                          : rows_of(h, type(), tokens, shape.offset, shape.width);
  }

  at::Tensor chunk(const at::Tensor& tensor) const {
    return rows_of(tensor, type(), tokens, shape.offset, shape.width);
  }

  template <class Body>
  void each_block(Body body) const {
    for (std::int64_t first = 0; first < tokens; first += kRows) body(first, std::min(kRows, tokens - first));
  }
};

at::Tensor product(const at::Tensor& rows, const at::Tensor& weights, const at::Tensor& bias) {
  return bias.defined() ? at::addmm(bias, rows, weights) : at::mm(rows, weights);
}

at::Tensor activated(Activation kind, const at::Tensor& before) {
  switch (kind) {
    case Activation::kRelu:
      return at::relu(before);
    case Activation::kGelu:
      return at::gelu(before);
    case Activation::kSilu:
      return at::silu(before);
    case Activation::kTanh:
      return at::tanh(before);
    default:
      return before;
  }
}

at::Tensor activation_grad(Activation kind, const at::Tensor& grad, const at::Tensor& before,
                           const at::Tensor& active) {
  switch (kind) {
    case Activation::kRelu:
      return at::threshold_backward(grad, before, 0);
    case Activation::kGelu:
      return at::gelu_backward(grad, before);
    case Activation::kSilu:
      return at::silu_backward(grad, before);
    case Activation::kTanh:
      return at::tanh_backward(grad, active);
    default:
      return grad;
  }
}

// hidden = active * gate, of one block.
struct Hidden {
  at::Tensor before, active, gate, hidden;

  Hidden(const Large& seed, at::Tensor before, at::Tensor gate)
      : before(std::move(before)), active(activated(seed.shape.activation, this->before)), gate(std::move(gate)) {
    hidden = seed.shape.gated ? active * this->gate : active;
  }

  Hidden(const Large& seed, const at::Tensor& source)
      : Hidden(seed, product(source, seed.A, seed.a),
               seed.shape.gated ? product(source, seed.G, seed.c) : at::Tensor()) {}

  static Hidden kept(const Large& seed, std::int64_t first, std::int64_t rows) {
    return Hidden(seed, seed.kept_before.narrow(0, first, rows),
                  seed.shape.gated ? seed.kept_gate.narrow(0, first, rows) : at::Tensor());
  }

  void clear(const at::Tensor& rows) {
    for (auto* tensor : {&before, &active, &gate, &hidden}) {
      if (tensor->defined()) *tensor = tensor->masked_fill(rows, 0);
    }
  }
};

// [rows, 1], true where a token's g is not finite; undefined where none is.
at::Tensor find_contained(const at::Tensor& g) {
  return all_finite(g) ? at::Tensor() : g.isfinite().all(1, /*keepdim=*/true).logical_not();
}

// Whether g is certainly finite, without computing it: |g| <= max |B| * sum |hidden| + max |b|.
bool surely_finite(const Large& seed, const at::Tensor& hidden) {
  const auto most = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.abs().max().item<double>() : 0.0;
  };
  const bool single = seed.type() == at::kFloat;
  const double largest = single ? std::numeric_limits<float>::max() : std::numeric_limits<double>::max();
  return hidden.abs().sum().item<double>() * most(seed.B) + most(seed.b) <= largest / 4;
}

void forward_one(const Large& seed, const at::Tensor& h, const std::optional<at::Tensor>& x,
                 const at::Tensor& y, ChunkStats* stats) {
  const bool blends = seed.scalars.alpha_fwd != 0.0f;
  if (!blends && stats == nullptr) return;
  const auto source = seed.source(h, x), host = seed.chunk(h);
  const bool in_place = y.is_contiguous() && y.scalar_type() == seed.type();
  const auto to = in_place ? seed.chunk(y) : at::empty(host.sizes(), host.options());
  seed.each_block([&](std::int64_t first, std::int64_t rows) {
    const Hidden tiles(seed, source.narrow(0, first, rows));
    if (seed.kept_before.defined()) seed.kept_before.narrow(0, first, rows).copy_(tiles.before);
    if (seed.kept_gate.defined()) seed.kept_gate.narrow(0, first, rows).copy_(tiles.gate);
    auto g = product(tiles.hidden, seed.B, seed.b);
    auto contained = seed.broken ? at::ones({rows, 1}, g.options().dtype(at::kBool)) : find_contained(g);
    if (contained.defined()) g = g.masked_fill(contained, 0);
    if (stats != nullptr) {
      stats->g_energy += g.square().sum(at::kDouble).item<double>();
      if (contained.defined()) stats->nonfinite_rows += contained.sum().item<double>();
    }
    auto block = to.narrow(0, first, rows);
    if (blends) at::add_out(block, host.narrow(0, first, rows), g, seed.scalars.alpha_fwd);
  });
  if (blends && !in_place) {
    const auto target = y.narrow(-1, seed.shape.offset, seed.shape.width);
    target.copy_(to.view(target.sizes()));
  }
}

// Gradients of one seed's parameters; undefined where nothing trains or it has none.
struct Sums {
  at::Tensor A, a, G, c, B, b;
};

// weights += alpha_bwd * left^T right and bias += alpha_bwd * sum of right's rows; made by the first block.
void add_grads(const Large& seed, const at::Tensor& left, const at::Tensor& right, bool has_bias,
               at::Tensor& weights, at::Tensor& bias) {
  const auto alpha = seed.scalars.alpha_bwd;
  const bool first = !weights.defined();
  if (first) weights = at::empty({left.size(1), right.size(1)}, left.options());
  at::addmm_out(weights, weights, left.t(), right, /*beta=*/first ? 0 : 1, alpha);
  if (!has_bias) return;
  const auto sum = right.sum(0).mul_(alpha);
  bias = first ? sum : bias.add_(sum);
}

void backward_one(const Large& seed, const at::Tensor& source, const at::Tensor& dy, Sums* sums,
                  const at::Tensor& to) {
  if (seed.broken) return;
  seed.each_block([&](std::int64_t first, std::int64_t rows) {
    auto from = source.narrow(0, first, rows), grad = dy.narrow(0, first, rows);
    auto tiles = seed.kept_before.defined() ? Hidden::kept(seed, first, rows) : Hidden(seed, from);
    if (!surely_finite(seed, tiles.hidden)) {
      const auto contained = find_contained(product(tiles.hidden, seed.B, seed.b));
      if (contained.defined()) {  // nothing of them may enter a sum: zero times NaN is NaN
        tiles.clear(contained);
        from = from.masked_fill(contained, 0);
        grad = grad.masked_fill(contained, 0);
      }
    }
    const auto d_hidden = at::mm(grad, seed.B.t());
    const auto d_active = seed.shape.gated ? d_hidden * tiles.gate : d_hidden;
    const auto d_before = activation_grad(seed.shape.activation, d_active, tiles.before, tiles.active);
    const auto d_gate = seed.shape.gated ? d_hidden * tiles.active : at::Tensor();
    if (sums != nullptr) {
      add_grads(seed, tiles.hidden, grad, seed.b.defined(), sums->B, sums->b);
      add_grads(seed, from, d_before, seed.a.defined(), sums->A, sums->a);
      if (seed.shape.gated) add_grads(seed, from, d_gate, seed.c.defined(), sums->G, sums->c);
    }
    if (to.defined()) {
      auto block = to.narrow(0, first, rows);
      block.addmm_(d_before, seed.A.t(), 1, seed.scalars.gamma);
      if (seed.shape.gated) block.addmm_(d_gate, seed.G.t(), 1, seed.scalars.gamma);
    }
  });
}

}  // namespace

bool is_large(const PlannedSeed& seed, at::ScalarType compute_type) {
  const auto& s = seed.shape;
  if (s.family != Family::kBottleneck) return false;
  const auto elements = (s.source_width * (s.gated ? 2 : 1) + s.width) * s.rank;
  return elements * static_cast<std::int64_t>(c10::elementSize(compute_type)) >= kLargeWeights;
}

void forward_large(const SlotCall& call, const at::Tensor& h, const std::optional<at::Tensor>& x,
                   at::TensorList params, const at::Tensor& y, const at::Tensor& hidden, ChunkStats* stats) {
  for (std::size_t i = 0; i < call.seeds.size(); ++i) {
    if (!is_large(call.seeds[i], call.compute_type)) continue;
    forward_one(Large(call, call.seeds[i], params, hidden), h, x, y, stats == nullptr ? nullptr : stats + i);
  }
}

void backward_large(const SlotCall& call, const at::Tensor& dy, const std::optional<at::Tensor>& h,
                    const std::optional<at::Tensor>& x, at::TensorList params, const at::Tensor& hidden,
                    at::IntArrayRef need, const at::Tensor& dh, const at::Tensor& dx, std::vector<at::Tensor>& dparams) {
  for (std::size_t i = 0; i < call.seeds.size(); ++i) {
    const auto& planned = call.seeds[i];
    if (!is_large(planned, call.compute_type)) continue;
    const bool input = planned.shape.source == Source::kInput;
    const auto& target = input ? dx : dh;
    const bool sends = planned.scalars.gamma != 0.0f && target.defined();
    bool trains = false;
    each_param<float>(planned, [&](auto, std::size_t index, std::int64_t, std::int64_t) {
      trains |= planned.scalars.alpha_bwd != 0.0f && need[kNeedParams + index] != 0;
    });
    if (!trains && !sends) continue;
    const Large seed(call, planned, params, hidden);
    const auto source = input ? seed.source(*x, x) : seed.source(*h, x);
    const bool in_place = sends && target.is_contiguous() && target.scalar_type() == seed.type();
    at::Tensor to;
    if (in_place) to = input ? seed.source(dx, dx) : seed.chunk(dh);
    if (sends && !in_place) to = at::zeros(source.sizes(), source.options());
    Sums sums;
    backward_one(seed, source, seed.chunk(dy), trains ? &sums : nullptr, to);
    if (sends && !in_place) {
      auto columns = target.narrow(-1, input ? 0 : planned.shape.offset, planned.shape.source_width);
      columns.add_(to.view(columns.sizes()));
    }
    const auto put = [&](std::int64_t index, const at::Tensor& grad) {
      if (index < 0 || need[static_cast<std::size_t>(kNeedParams + index)] == 0) return;
      dparams[static_cast<std::size_t>(index)] = grad;
    };
    const auto& p = planned.params;
    put(p.A, sums.A), put(p.a, sums.a), put(p.G, sums.G);
    put(p.c, sums.c), put(p.B, sums.B), put(p.b, sums.b);
  }
}

}  // namespace esper
