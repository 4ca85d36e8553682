#include "ops/spatial.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/cpu/memory.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/spatial.h"
#include "ops/views.h"

namespace esper {
namespace {

constexpr std::int64_t kGrain = 32768;  // multiply-adds that are worth a worker of their own

// Samples divided among workers by sizes and the number of threads alone, which keeps results repeatable.
struct Division {
  std::int64_t workers, samples;

  template <class Body>
  void run(Body body) const {
    at::parallel_for(0, workers, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker) {
        for (auto n = samples * worker / workers; n < samples * (worker + 1) / workers; ++n) body(worker, n);
      }
    });
  }
};

Division divide(const SeedShape& shape, const Positions& positions) {
  std::int64_t work = 4 * shape.width;
  if (shape.family == Family::kDepthwise) {
    work += shape.rank * (shape.window_height * shape.window_width + shape.width);
  }
  const auto wanted = positions.samples * positions.per_sample() * work / kGrain + 1;
  const auto most = std::min<std::int64_t>(at::get_num_threads(), positions.samples);
  return {std::max<std::int64_t>(1, std::min(wanted, most)), positions.samples};
}

// The tensors of one call in the type of the kernels and in one layout; undefined where absent.
struct Tensors {
  bool planes;
  at::Tensor h, x, dy;  // read
  at::Tensor y, dh, dx; // written
};

// The matrix of each sample, from one feature on. The strides of axes of size 1 say nothing, so they are
// worked out.
template <class T>
cpu::Field<T> field_of(const at::Tensor& tensor, const SlotCall& call, bool planes,
                       std::int64_t first_feature) {
  const auto features = tensor.size(-1), positions = call.positions.per_sample();
  cpu::Field<T> field;
  if constexpr (std::is_const_v<T>) {
    field.data = tensor.const_data_ptr<std::remove_const_t<T>>();
  } else {
    field.data = tensor.mutable_data_ptr<T>();
  }
  field.data += first_feature * (planes ? positions : 1);
  field.sample = features * positions;
  field.row = planes ? positions : features;
  return field;
}

// The parameters in the type of the kernels, and what keeps them alive.
template <class T>
struct Params {
  std::vector<at::Tensor> owned;
  std::vector<SeedTensors<const T>> seeds;

  Params(const SlotCall& call, at::TensorList params) : seeds(call.seeds.size()) {
    for (const auto& tensor : params) owned.push_back(as_operand(tensor, call.compute_type));
    for (std::size_t i = 0; i < call.seeds.size(); ++i) {
      each_param<const T>(call.seeds[i], [&](auto member, std::size_t index, std::int64_t, std::int64_t) {
        seeds[i].*member = owned[index].template const_data_ptr<T>();
      });
    }
  }
};

template <class T>
cpu::SpatialJob<T> start_job(const SlotCall& call, std::size_t i, const SeedTensors<const T>& params,
                             const Tensors& tensors) {
  const auto& seed = call.seeds[i];
  const bool input = seed.shape.source == Source::kInput;
  cpu::SpatialJob<T> job;
  job.shape = seed.shape;
  job.scalars = seed.scalars;
  job.positions = call.positions;
  job.params = params;
  job.planes = tensors.planes;
  job.max_B = cpu::largest_magnitude(params.B, seed.shape.rank * seed.shape.width);
  job.max_b = cpu::largest_magnitude(params.b, seed.shape.width);
  job.source = field_of<const T>(input ? tensors.x : tensors.h, call, tensors.planes,
                                 input ? 0 : seed.shape.offset);
  return job;
}

std::int64_t scratch_of(const SeedShape& shape, const Positions& positions) {
  return shape.family == Family::kDepthwise ? cpu::DepthwiseTiles(shape, positions).end
                                            : cpu::SqueezeTiles(shape).end;
}

// Sum over the workers, in their order, of a gradient with rows of `stride`; times alpha_bwd.
template <class T>
at::Tensor reduce(const T* accumulators, std::int64_t worker_stride, std::int64_t workers, std::int64_t rows,
                  std::int64_t columns, std::int64_t stride, T alpha_bwd, const at::Tensor& param,
                  at::ScalarType type) {
  auto grad = at::empty(param.sizes(), param.options().dtype(type));
  T* to = grad.template mutable_data_ptr<T>();
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      T sum = 0;
      for (std::int64_t w = 0; w < workers; ++w) sum += accumulators[w * worker_stride + i * stride + j];
      to[i * columns + j] = alpha_bwd * sum;
    }
  }
  return grad.to(param.scalar_type());
}

cpu::SpatialGrads grads_of(const SeedShape& shape) {
  cpu::SpatialGrads grads;
  const auto take = [&grads](std::int64_t elements) {
    const auto at = grads.end;
    grads.end += cpu::in_steps(elements);
    return at;
  };
  const bool depthwise = shape.family == Family::kDepthwise;
  grads.A = take(shape.rank * (depthwise ? shape.window_height * shape.window_width : shape.source_width));
  grads.a = take(shape.rank);
  grads.B = take(shape.width * cpu::in_steps(shape.rank));
  grads.b = take(shape.width);
  return grads;
}

template <class T>
void run_forward(const SlotCall& call, at::TensorList given, const Tensors& tensors, ChunkStats* stats) {
  const Params<T> params(call, given);
  for (std::size_t i = 0; i < call.seeds.size(); ++i) {
    const auto& seed = call.seeds[i];
    if (!is_spatial(seed.shape.family)) continue;
    if (seed.scalars.alpha_fwd == 0.0f && stats == nullptr) continue;
    auto job = start_job<T>(call, i, params.seeds[i], tensors);
    job.telemetry = stats != nullptr;
    job.h = field_of<const T>(tensors.h, call, tensors.planes, seed.shape.offset);
    job.y = field_of<T>(tensors.y, call, tensors.planes, seed.shape.offset);
    const auto division = divide(seed.shape, call.positions);
    const auto stride = scratch_of(seed.shape, call.positions);
    const auto scratch = aligned_memory<T>(stride * division.workers);
    std::vector<ChunkStats> partial(static_cast<std::size_t>(division.workers));
    division.run([&](std::int64_t worker, std::int64_t sample) {
      cpu::spatial_kernels<T>().forward(job, sample, scratch.get() + worker * stride,
                                        &partial[static_cast<std::size_t>(worker)]);
    });
    for (const auto& part : partial) {
      if (stats != nullptr) merge(stats[i], part);
    }
  }
}

template <class T>
void run_backward(const SlotCall& call, at::TensorList given, const Tensors& tensors, at::IntArrayRef need,
                  std::vector<at::Tensor>& dparams) {
  const Params<T> params(call, given);
  for (std::size_t i = 0; i < call.seeds.size(); ++i) {
    const auto& seed = call.seeds[i];
    if (!is_spatial(seed.shape.family)) continue;
    const bool input = seed.shape.source == Source::kInput;
    const auto& dsource = input ? tensors.dx : tensors.dh;
    auto job = start_job<T>(call, i, params.seeds[i], tensors);
    job.dy = field_of<const T>(tensors.dy, call, tensors.planes, seed.shape.offset);
    job.sends = seed.scalars.gamma != 0.0f && dsource.defined();
    if (job.sends) job.dsource = field_of<T>(dsource, call, tensors.planes, input ? 0 : seed.shape.offset);
    each_param<T>(seed, [&](auto, std::size_t index, std::int64_t, std::int64_t) {
      job.trains |= seed.scalars.alpha_bwd != 0.0f && need[kNeedParams + index] != 0;
    });
    if (job.trains) job.grads = grads_of(seed.shape);
    const auto division = divide(seed.shape, call.positions);
    const auto accumulators = aligned_memory<T>(job.grads.end * division.workers);
    std::fill_n(accumulators.get(), job.grads.end * division.workers, T(0));
    if (job.trains || job.sends) {
      const auto stride = scratch_of(seed.shape, call.positions);
      const auto scratch = aligned_memory<T>(stride * division.workers);
      division.run([&](std::int64_t worker, std::int64_t sample) {
        cpu::spatial_kernels<T>().backward(job, sample, scratch.get() + worker * stride,
                                           accumulators.get() + worker * job.grads.end);
      });
    }
    T* base = accumulators.get();
    const SeedTensors<T> at_worker_0 = {base + job.grads.A, base + job.grads.a, nullptr,
                                        nullptr,            base + job.grads.B, base + job.grads.b};
    each_param<T>(seed, [&](auto member, std::size_t index, std::int64_t rows, std::int64_t columns) {
      if (need[kNeedParams + index] == 0 || !job.trains) return;
      const bool padded = member == &SeedTensors<T>::B;
      dparams[index] = reduce<T>(at_worker_0.*member, job.grads.end, division.workers, rows, columns,
                                 padded ? cpu::in_steps(columns) : columns,
                                 static_cast<T>(seed.scalars.alpha_bwd), given[index], call.compute_type);
    });
  }
}

}  // namespace

Outputs spatial_forward(const SlotCall& call, const at::Tensor& h, const std::optional<at::Tensor>& x,
                        at::TensorList params, bool telemetry, const std::function<Outputs()>& others) {
  const bool alone = !telemetry && std::all_of(call.seeds.begin(), call.seeds.end(), [](const auto& seed) {
    return is_spatial(seed.shape.family);
  });
  const auto type = call.compute_type;
  Tensors tensors{in_planes(h), {}, {}, {}, {}, {}, {}};
  tensors.h = laid_out(h, type, tensors.planes);
  if (call.input_width > 0) tensors.x = laid_out(*x, type, tensors.planes);
  at::Tensor stats = at::empty({0, kNumStats}, h.options().dtype(at::kDouble));
  at::Tensor hidden = at::empty({0}, h.options().dtype(type));
  if (alone) {
    tensors.y = tensors.h.clone();
  } else {
    std::tie(tensors.y, stats, hidden) = others();
    tensors.y = laid_out(tensors.y, type, tensors.planes);
  }
  if (call.tokens > 0) {
    auto* rows = telemetry ? reinterpret_cast<ChunkStats*>(stats.mutable_data_ptr<double>()) : nullptr;
    if (type == at::kDouble) {
      run_forward<double>(call, params, tensors, rows);
    } else {
      run_forward<float>(call, params, tensors, rows);
    }
  }
  return {tensors.y.to(h.scalar_type()), std::move(stats), std::move(hidden)};
}

Gradients spatial_backward(const SlotCall& call, const at::Tensor& dy, const std::optional<at::Tensor>& h,
                           const std::optional<at::Tensor>& x, at::TensorList params, at::IntArrayRef need,
                           const std::function<Gradients()>& others) {
  const auto type = call.compute_type;
  Tensors tensors{in_planes(call.reads_output ? *h : dy), {}, {}, {}, {}, {}, {}};
  tensors.dy = laid_out(dy, type, tensors.planes);
  if (call.reads_output) tensors.h = laid_out(*h, type, tensors.planes);
  if (call.input_width > 0) tensors.x = laid_out(*x, type, tensors.planes);
  auto [dh, dx, dparams] = others();
  if (call.tokens == 0) return {std::move(dh), std::move(dx), std::move(dparams)};
  if (need[kNeedHost] != 0) tensors.dh = laid_out(dh, type, tensors.planes);
  if (need[kNeedInput] != 0 && tensors.x.defined()) tensors.dx = laid_out(dx, type, tensors.planes);
  if (type == at::kDouble) {
    run_backward<double>(call, params, tensors, need, dparams);
  } else {
    run_backward<float>(call, params, tensors, need, dparams);
  }
  if (tensors.dh.defined()) dh = tensors.dh.to(dy.scalar_type());
  if (tensors.dx.defined()) dx = tensors.dx.to(x->scalar_type());
  return {std::move(dh), std::move(dx), std::move(dparams)};
}

}  // namespace esper
