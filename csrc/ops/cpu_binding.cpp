// The operators on the CPU: operands in, workers over blocks of tokens, partial results reduced in order.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "kernels/cpu/memory.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/slot.h"
#include "ops/cpu.h"
#include "ops/large.h"
#include "ops/recycled.h"
#include "ops/slot.h"
#include "ops/spatial.h"
#include "ops/views.h"

namespace esper {
namespace {

constexpr std::int64_t kGrain = 32768;  // multiply-adds that are worth a worker of their own

// How the tokens are divided: a number of workers, each with consecutive blocks. It depends on the sizes
// and the number of threads alone, which is what makes results repeatable.
struct Division {
  std::int64_t workers, blocks, tokens;

  std::int64_t first(std::int64_t worker) const {
    return std::min(blocks * worker / workers * cpu::kBlock, tokens);
  }

  template <class Body>
  void run(Body body) const {
    at::parallel_for(0, workers, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker) {
        body(worker, first(worker), first(worker + 1));
      }
    });
  }
};

// Whether other code computes a seed, after the slot kernels.
bool is_elsewhere(const SlotCall& call, const PlannedSeed& seed) {
  return is_spatial(seed.shape.family) || is_large(seed, call.compute_type);
}

Division divide(const SlotCall& call) {
  std::int64_t work = call.width;
  for (const auto& seed : call.seeds) {
    const auto& s = seed.shape;
    if (is_elsewhere(call, seed)) continue;
    work += (s.source_width * (s.gated ? 2 : 1) + s.width) * std::max<std::int64_t>(s.rank, 1);
  }
  const auto blocks = (call.tokens + cpu::kBlock - 1) / cpu::kBlock;
  const auto wanted = std::min(blocks, call.tokens * work / kGrain + 1);
  return {std::max<std::int64_t>(1, std::min<std::int64_t>(wanted, at::get_num_threads())), blocks,
          call.tokens};
}

// The parameters in the type of the kernels: the caller's own where they are that already.
template <class T>
struct Operands {
  std::vector<at::Tensor> converted;
  at::TensorList params;
  std::vector<SeedTensors<const T>> tensors;

  Operands(const SlotCall& call, at::TensorList given) : params(given) {
    const auto fits = [&call](const at::Tensor& tensor) {
      return tensor.scalar_type() == call.compute_type && tensor.is_contiguous();
    };
    if (!std::all_of(given.begin(), given.end(), fits)) {
      converted.reserve(given.size());
      for (const auto& tensor : given) converted.push_back(as_operand(tensor, call.compute_type));
      params = converted;
    }
    tensors.resize(call.seeds.size());
    for (std::size_t i = 0; i < call.seeds.size(); ++i) {
      each_param<const T>(call.seeds[i], [&](auto member, std::size_t index, std::int64_t, std::int64_t) {
        tensors[i].*member = params[index].template const_data_ptr<T>();
      });
    }
  }
};

template <class T>
cpu::SlotJob<T> start_job(const SlotCall& call) {
  cpu::SlotJob<T> job;
  job.tokens = call.tokens;
  job.width = call.width;
  job.input_width = call.input_width;
  job.seeds.reserve(call.seeds.size());
  for (const auto& seed : call.seeds) {
    auto& packed = job.seeds.emplace_back();
    packed.shape = seed.shape;
    packed.scalars = seed.scalars;
    packed.kept = seed.hidden;
    packed.elsewhere = is_elsewhere(call, seed);
  }
  return job;
}

// The tensors of one call. Those that cannot be walked in place pass through tiles of a block of tokens.
template <class T>
class Passage {
 public:
  // `hidden` may be undefined.
  Passage(const SlotCall& call, const at::Tensor& hidden, std::initializer_list<const Viewed*> tensors)
      : tokens_(call.tokens) {
    const auto tokens = tokens_;
    if (hidden.defined()) hidden_ = hidden.template mutable_data_ptr<T>();
    std::int64_t widest = 1;
    for (const auto* viewed : tensors) {
      if (!viewed->defined() || viewed->direct(tokens)) continue;
      staged_ = true;
      widest = std::max(widest, viewed->tensor.size(-1));
      elements_ += cpu::round_up(viewed->tensor.size(-1), 64 / std::int64_t{sizeof(T)});
    }
    // As many rows as the second level of cache holds well.
    constexpr std::int64_t kTile = 1 << 16;
    rows_ = std::clamp<std::int64_t>(kTile / widest / 16 * 16, 16, cpu::kBlock);
    elements_ *= rows_;
  }

  // Elements of scratch memory for one worker.
  std::int64_t elements() const { return elements_; }

  // Calls body(tensors, first, last) for tokens [first, last): once, or for each block with its tiles filled
  // before and emptied after it.
  template <class Body>
  void run(const Viewed& h, const Viewed& x, const Viewed& y, const Viewed& dy, const Viewed& dh,
           const Viewed& dx, std::int64_t first, std::int64_t last, T* scratch, Body body) const {
    const auto& kernels = cpu::slot_kernels<T>();
    const auto step = staged_ ? rows_ : std::max<std::int64_t>(last - first, 1);
    for (; first < last; first += step) {
      const auto rows = std::min(step, last - first);
      T* free = scratch;
      // Where the block is, of a tensor that is read or written.
      const auto place = [&](const Viewed& viewed, bool read) -> T* {
        if (!viewed.defined()) return nullptr;
        const auto width = viewed.tensor.size(-1);
        if (viewed.direct(tokens_)) return static_cast<T*>(viewed.view.data) + first * width;
        T* tile = free;
        free += rows_ * cpu::round_up(width, 64 / std::int64_t{sizeof(T)});
        if (read) kernels.gather(viewed.view, first, rows, width, tile);
        return tile;
      };
      const auto finish = [&](const Viewed& viewed, const T* tile) {
        if (!viewed.defined() || viewed.direct(tokens_)) return;
        kernels.scatter(tile, rows, viewed.tensor.size(-1), first, viewed.view);
      };
      cpu::SlotTensors<T> tensors;
      tensors.hidden = hidden_;
      tensors.first = first;
      tensors.h = place(h, true);
      tensors.x = place(x, true);
      tensors.dy = place(dy, true);
      tensors.y = place(y, false);
      tensors.dh = place(dh, false);
      tensors.dx = place(dx, false);
      const auto& result = y.defined() ? y : dh;
      tensors.past = result.defined() && result.direct(tokens_) &&
                     static_cast<std::int64_t>(result.tensor.nbytes()) >= cpu::kPastCache;
      body(tensors, rows);
      finish(y, tensors.y);
      finish(dh, tensors.dh);
      finish(dx, tensors.dx);
    }
  }

 private:
  std::int64_t tokens_, rows_ = cpu::kBlock, elements_ = 0;
  T* hidden_ = nullptr;
  bool staged_ = false;
};

template <class T>
Outputs forward(const SlotCall& call, const at::Tensor& h, const std::optional<at::Tensor>& x,
                at::TensorList params, bool telemetry, bool keep) {
  const auto seeds = static_cast<std::int64_t>(call.seeds.size());
  const auto from = Viewed::input(h, call.compute_type);
  const auto input = call.input_width > 0 ? Viewed::input(*x, call.compute_type) : Viewed();
  const auto y = Viewed::output(h, call.compute_type, in_planes(h));
  const auto in_type = h.options().dtype(call.compute_type);
  const auto hidden = keep ? recycled_empty({call.tokens * call.hidden_width}, in_type) : at::Tensor();
  auto stats = at::empty({telemetry ? seeds : 0, kNumStats}, h.options().dtype(at::kDouble));
  const Operands<T> operands(call, params);
  auto job = start_job<T>(call);
  job.telemetry = telemetry;
  cpu::pack(job, operands.tensors, false);

  const auto division = divide(call);
  const Passage<T> passage(call, hidden, {&from, &input, &y});
  const auto own = cpu::round_up(job.scratch, 64);
  const auto stride = own + cpu::round_up(passage.elements(), 64);
  const auto scratch = aligned_memory<T>(stride * division.workers);
  std::vector<ChunkStats> partial(static_cast<std::size_t>(telemetry ? seeds * division.workers : 0));
  const auto& kernels = cpu::slot_kernels<T>();
  division.run([&](std::int64_t worker, std::int64_t first, std::int64_t last) {
    T* memory = scratch.get() + worker * stride;
    passage.run(from, input, y, {}, {}, {}, first, last, memory + own, [&](const auto& tensors, auto rows) {
      kernels.forward(job, tensors, 0, rows, memory,
                      telemetry ? partial.data() + worker * seeds : nullptr);
    });
  });
  auto* rows = telemetry ? reinterpret_cast<ChunkStats*>(stats.template mutable_data_ptr<double>()) : nullptr;
  if (telemetry) {
    for (std::int64_t i = 0; i < seeds; ++i) {
      rows[i] = ChunkStats{};
      for (std::int64_t w = 0; w < division.workers; ++w) {
        merge(rows[i], partial[static_cast<std::size_t>(w * seeds + i)]);
      }
    }
  }
  forward_large(call, h, x, operands.params, y.tensor, hidden, rows);
  return {y.tensor, std::move(stats), keep ? hidden : at::empty({0}, in_type)};
}

// Sum over the workers, in their order, of one gradient whose element (i, j) lies at i * row + j * column;
// times alpha_bwd.
template <class T>
void reduce(const T* accumulators, std::int64_t stride, std::int64_t workers, std::int64_t rows,
            std::int64_t columns, std::int64_t row, std::int64_t column, T alpha_bwd, T* to) {
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      T sum = 0;
      for (std::int64_t w = 0; w < workers; ++w) sum += accumulators[w * stride + i * row + j * column];
      to[i * columns + j] = alpha_bwd * sum;
    }
  }
}

// Memory of the parameters' gradients: each its own, as the outputs of an operator must have, or all in one block,
// which takes half as long for small ones.
class GradientMemory {
 public:
  GradientMemory(const SlotCall& call, at::TensorList params, at::IntArrayRef need, bool together)
      : type_(call.compute_type) {
    if (!together) return;
    std::int64_t elements = 0;
    for (std::size_t p = 0; p < params.size(); ++p) {
      if (need[kNeedParams + p] != 0) elements += in_lines(params[p].numel());
    }
    block_ = recycled_empty({elements}, at::TensorOptions(type_));
  }

  at::Tensor take(at::IntArrayRef sizes) {
    if (!block_.defined()) return at::detail::empty_cpu(sizes, type_);
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(block_.storage()),
                                                           c10::DispatchKeySet(c10::DispatchKey::CPU), block_.dtype());
    tensor.unsafeGetTensorImpl()->set_storage_offset(used_);
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
    used_ += in_lines(tensor.numel());
    return tensor;
  }

 private:
  static std::int64_t in_lines(std::int64_t elements) { return cpu::round_up(elements, 16); }

  at::ScalarType type_;
  at::Tensor block_;
  std::int64_t used_ = 0;
};

template <class T>
Gradients backward(const SlotCall& call, const at::Tensor& dy, const std::optional<at::Tensor>& h,
                   const std::optional<at::Tensor>& x, at::TensorList params, const at::Tensor& hidden,
                   at::IntArrayRef need, bool together) {
  const auto grad = Viewed::input(dy, call.compute_type);
  const auto from = call.reads_output ? Viewed::input(*h, call.compute_type) : Viewed();
  const auto input = call.input_width > 0 ? Viewed::input(*x, call.compute_type) : Viewed();
  const bool need_dh = need[kNeedHost] != 0;
  const bool need_dx = need[kNeedInput] != 0 && input.defined();
  const bool planes = in_planes(h.has_value() && h->defined() ? *h : dy);
  const auto dh = need_dh ? Viewed::output(dy, call.compute_type, planes) : Viewed();
  const auto dx = need_dx ? Viewed::output(*x, call.compute_type, planes && x->dim() >= 3) : Viewed();

  const Operands<T> operands(call, params);
  auto job = start_job<T>(call);
  for (std::size_t i = 0; i < call.seeds.size(); ++i) {
    auto& seed = job.seeds[i];
    if (seed.elsewhere) continue;
    if (seed.scalars.alpha_bwd != 0.0f) {
      each_param<T>(call.seeds[i], [&](auto, std::size_t index, std::int64_t, std::int64_t) {
        seed.trains |= need[kNeedParams + index] != 0;
      });
    }
    seed.sends = seed.scalars.gamma != 0.0f &&
                 (seed.shape.source == Source::kInput ? need_dx : need_dh);
  }
  cpu::pack(job, operands.tensors, true);

  const auto division = divide(call);
  const Passage<T> passage(call, hidden, {&from, &input, &grad, &dh, &dx});
  const auto own = cpu::round_up(job.scratch, 64);
  const auto stride = own + cpu::round_up(passage.elements(), 64);
  const auto scratch = aligned_memory<T>(stride * division.workers);
  const auto grad_stride = job.grads.empty() ? 0 : cpu::round_up(job.grads.back().end, 64);
  const auto accumulators = aligned_memory<T>(grad_stride * division.workers);
  const auto& kernels = cpu::slot_kernels<T>();
  division.run([&](std::int64_t worker, std::int64_t first, std::int64_t last) {
    T* accumulator = accumulators.get() + worker * grad_stride;
    std::fill_n(accumulator, grad_stride, T(0));
    T* memory = scratch.get() + worker * stride;
    passage.run(from, input, {}, grad, dh, dx, first, last, memory + own, [&](const auto& tensors, auto rows) {
      kernels.backward(job, tensors, 0, rows, memory, accumulator);
    });
  });

  std::vector<at::Tensor> dparams(params.size());
  GradientMemory memory(call, params, need, together);
  for (std::size_t i = 0; i < call.seeds.size(); ++i) {
    const auto& seed = job.seeds[i];
    const auto alpha = static_cast<T>(seed.scalars.alpha_bwd);
    SeedTensors<T> at_worker_0;
    T* base = accumulators.get();
    const auto& layout = job.grads[i];
    at_worker_0 = {base + layout.A, base + layout.a, base + layout.G,
                   base + layout.c, base + layout.B, base + layout.b};
    each_param<T>(call.seeds[i], [&](auto member, std::size_t index, std::int64_t rows,
                                     std::int64_t columns) {
      if (need[kNeedParams + index] == 0 || !seed.trains) return;
      const bool transposed = member == &SeedTensors<T>::A || member == &SeedTensors<T>::G;
      dparams[index] = memory.take(params[index].sizes());
      reduce<T>(at_worker_0.*member, grad_stride, division.workers, rows, columns,
                transposed ? 1 : seed.width_p, transposed ? seed.source_p : 1, alpha,
                static_cast<T*>(dparams[index].mutable_data_ptr()));
    });
  }
  backward_large(call, dy, h, x, operands.params, hidden, need, dh.tensor, dx.tensor, dparams);
  for (std::size_t p = 0; p < params.size(); ++p) {
    if (need[kNeedParams + p] == 0) continue;
    if (!dparams[p].defined()) dparams[p] = at::zeros(params[p].sizes(), params[p].options());
    const auto type = params[p].scalar_type();
    if (dparams[p].scalar_type() != type) dparams[p] = dparams[p].to(type);
  }
  const auto absent = [&] { return at::empty({0}, dy.options()); };
  return {need_dh ? dh.tensor : absent(), need_dx ? dx.tensor.to(x->scalar_type()) : absent(), std::move(dparams)};
}

}  // namespace

Outputs forward_on_cpu(const SlotCall& call, const at::Tensor& h, const std::optional<at::Tensor>& x,
                       at::TensorList params, bool telemetry, bool keep) {
  keep &= call.hidden_width > 0;
  const auto run = [&] {
    return call.compute_type == at::kDouble ? forward<double>(call, h, x, params, telemetry, keep)
                                            : forward<float>(call, h, x, params, telemetry, keep);
  };
  return any_spatial(call) ? spatial_forward(call, h, x, params, telemetry, run) : run();
}

Gradients backward_on_cpu(const SlotCall& call, const at::Tensor& dy, const std::optional<at::Tensor>& h,
                          const std::optional<at::Tensor>& x, at::TensorList params, const at::Tensor& hidden,
                          at::IntArrayRef need, bool together) {
  const auto run = [&] {
    return call.compute_type == at::kDouble ? backward<double>(call, dy, h, x, params, hidden, need, together)
                                            : backward<float>(call, dy, h, x, params, hidden, need, together);
  };
  return any_spatial(call) ? spatial_backward(call, dy, h, x, params, need, run) : run();
}

namespace {

Outputs slot_forward_cpu(const at::Tensor& h, const std::optional<at::Tensor>& x, at::TensorList params,
                         const at::Tensor& scalars, at::IntArrayRef plan, bool telemetry, bool keep) {
  return forward_on_cpu(check_slot("h", h, x, params, scalars, plan), h, x, params, telemetry, keep);
}

Gradients slot_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& h,
                            const std::optional<at::Tensor>& x, at::TensorList params,
                            const at::Tensor& scalars, at::IntArrayRef plan,
                            at::IntArrayRef need, const std::optional<at::Tensor>& hidden) {
  const auto call = check_slot("dy", dy, x, params, scalars, plan);
  check_backward(call, dy, h, params, hidden, need);
  auto gradients = backward_on_cpu(call, dy, h, x, params, hidden.value_or(at::Tensor()), need);
  auto& dparams = std::get<2>(gradients);
  for (std::size_t p = 0; p < params.size(); ++p) {  // an operator returns tensors only
    if (!dparams[p].defined()) dparams[p] = at::empty({0}, params[p].options());
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("slot_forward", &slot_forward_cpu);
  m.impl("slot_backward", &slot_backward_cpu);
}

}  // namespace esper
