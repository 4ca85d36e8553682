// Slot kernels for CUDA. Correct and repeatable (no atomics, every sum in one order); not yet fast.
#include "kernels/cuda/slot.h"

#include "kernels/cuda/launch.h"
#include "kernels/cuda/spatial.cuh"

namespace esper::cuda {
namespace {

// B of a bottleneck is [r, d], of a depthwise seed [d, r].
template <class T>
ESPER_HD T weight_B(const SeedCall<T>& call, std::int64_t k, std::int64_t j) {
  const bool turned = call.shape.family == Family::kDepthwise;
  return call.params.B[turned ? j * call.shape.rank + k : k * call.shape.width + j];
}

// hidden[n, k] and its pre-activations.
template <class T>
struct Hidden {
  SeedCall<T> call;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t rank = call.shape.rank, n = i / rank, k = i % rank;
    const T* source = source_row(call, n);
    T before = call.params.a != nullptr ? call.params.a[k] : T(0);
    for (std::int64_t s = 0; s < call.shape.source_width; ++s) {
      before += source[s] * call.params.A[s * rank + k];
    }
    T hidden = activate(call.shape.activation, before);
    if (call.shape.gated) {
      T gate = call.params.c != nullptr ? call.params.c[k] : T(0);
      for (std::int64_t s = 0; s < call.shape.source_width; ++s) {
        gate += source[s] * call.params.G[s * rank + k];
      }
      call.gate[i] = gate;
      hidden *= gate;
    }
    call.before[i] = before;
    call.hidden[i] = hidden;
  }
};

// g of one token for each block, its energy, and whether it is contained.
template <class T>
struct Output {
  struct Shared {
    double energy[kThreads];
    bool finite[kThreads];
  };
  SeedCall<T> call;
  T* y;  // null where the chunk stays h

  ESPER_DEVICE T element(std::int64_t n, std::int64_t j) const {
    const std::int64_t rank = call.shape.rank;
    if (call.shape.family == Family::kSqueezeExcite) {
      return source_row(call, n)[j] * call.excite()[n / call.positions.per_sample() * call.shape.width + j];
    }
    T g = call.params.b != nullptr ? call.params.b[j] : T(0);
    if (call.shape.family == Family::kAffine) return g + call.params.B[j] * source_row(call, n)[j];
    for (std::int64_t k = 0; k < rank; ++k) g += call.hidden[n * rank + k] * weight_B(call, k, j);
    return g;
  }

  // Whether what g of a token comes from is finite, which g does not always tell: an activation may make
  // something finite of an infinity, but its gradient would not be.
  ESPER_DEVICE bool sound(const Thread& thread, std::int64_t n) const {
    const std::int64_t rank = call.shape.rank;
    if (call.shape.family == Family::kSqueezeExcite) return call.trust[n / call.positions.per_sample()] >= 0.0;
    bool finite = true;
    for (std::int64_t k = thread.index(); k < rank; k += kThreads) {
      finite = finite && is_finite(call.before[n * rank + k]);
      if (call.shape.gated) finite = finite && is_finite(call.gate[n * rank + k]);
    }
    return finite;
  }

  ESPER_DEVICE void operator()(const Thread& thread, Shared& shared) const {
    for (std::int64_t n = thread.block(); n < call.tokens; n += thread.blocks()) {
      double energy = 0.0;
      bool finite = sound(thread, n);
      T* g = call.g + n * call.shape.width;
      for (std::int64_t j = thread.index(); j < call.shape.width; j += kThreads) {
        g[j] = element(n, j);
        finite = finite && is_finite(g[j]);
        energy += static_cast<double>(g[j]) * static_cast<double>(g[j]);
      }
      shared.energy[thread.index()] = energy;
      shared.finite[thread.index()] = finite;
      thread.sync();
      energy = 0.0;
      finite = true;
      for (int t = 0; t < kThreads; ++t) {
        energy += shared.energy[t];
        finite = finite && shared.finite[t];
      }
      if (thread.index() == 0) call.energy[n] = finite ? energy : -1.0;
      const std::int64_t at = n * call.width + call.shape.offset;
      for (std::int64_t j = thread.index(); y != nullptr && finite && j < call.shape.width; j += kThreads) {
        y[at + j] = call.h[at + j] + static_cast<T>(call.scalars.alpha_fwd) * g[j];
      }
      thread.sync();
    }
  }
};

// Telemetry of one chunk, by one block: each thread its tokens, then the threads in order.
template <class T>
struct Telemetry {
  struct Shared {
    ChunkStats part[kThreads];
  };
  SeedCall<T> call;
  ChunkStats* stats;

  ESPER_DEVICE void operator()(const Thread& thread, Shared& shared) const {
    const std::int64_t width = call.shape.width;
    ChunkStats own{};
    for (std::int64_t n = thread.index(); n < call.tokens; n += kThreads) {
      const T* h = call.h + n * call.width + call.shape.offset;
      const double shift = static_cast<double>(h[0]);
      double sum = 0.0, square = 0.0, neighbour = 0.0;
      ChunkStats row{};
      for (std::int64_t j = 0; j < width; ++j) {
        const double centred = static_cast<double>(h[j]) - shift;
        sum += centred;
        square += centred * centred;
        neighbour += centred * (static_cast<double>(h[j + 1 < width ? j + 1 : 0]) - shift);
        row.dead += h[j] < T(1e-12) && h[j] > T(-1e-12) ? 1.0 : 0.0;
      }
      row.count = static_cast<double>(width);
      row.mean = shift + sum / row.count;
      row.m2 = square - sum * sum / row.count;
      row.m2 = row.m2 < 0.0 ? 0.0 : row.m2;
      row.neighbour_cov = neighbour - sum * sum / row.count;
      row.h_energy = row.m2 + row.count * row.mean * row.mean;
      const double energy = call.energy[n];
      row.nonfinite_rows = energy < 0.0 ? 1.0 : 0.0;
      row.g_energy = energy < 0.0 ? 0.0 : energy;
      merge(own, row);
    }
    shared.part[thread.index()] = own;
    thread.sync();
    if (thread.index() == 0) {
      ChunkStats all = shared.part[0];
      for (int t = 1; t < kThreads; ++t) merge(all, shared.part[t]);
      *stats = all;
    }
  }
};

// Turns the pre-activations into their gradients and clears what belongs to a contained token.
template <class T>
struct HiddenGrad {
  SeedCall<T> call;
  const T* dy;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t rank = call.shape.rank, n = i / rank, k = i % rank;
    if (call.energy[n] < 0.0) {
      call.before[i] = call.hidden[i] = T(0);
      if (call.shape.gated) call.gate[i] = T(0);
      return;
    }
    T du = T(0);
    for (std::int64_t j = 0; j < call.shape.width; ++j) {
      du += dy[n * call.width + call.shape.offset + j] * weight_B(call, k, j);
    }
    const T before = call.before[i];
    T slope = activate_grad(call.shape.activation, before);
    if (call.shape.gated) {
      slope *= call.gate[i];
      call.gate[i] = du * activate(call.shape.activation, before);
    }
    call.before[i] = du * slope;
  }
};

template <class T>
struct SourceGrad {
  SeedCall<T> call;
  const T* dy;
  T* to;
  ESPER_HD void operator()(std::int64_t i) const {
    const auto& shape = call.shape;
    const std::int64_t n = i / shape.source_width, s = i % shape.source_width;
    if (call.energy[n] < 0.0) return;
    T sum = T(0);
    if (shape.family == Family::kAffine) {
      sum = call.params.B[s] * dy[n * call.width + shape.offset + s];
    }
    for (std::int64_t k = 0; k < shape.rank; ++k) {
      sum += call.before[n * shape.rank + k] * call.params.A[s * shape.rank + k];
      if (shape.gated) sum += call.gate[n * shape.rank + k] * call.params.G[s * shape.rank + k];
    }
    const bool input = shape.source == Source::kInput;
    to[input ? n * call.input_width + s : n * call.width + shape.offset + s] +=
        static_cast<T>(call.scalars.gamma) * sum;
  }
};

// to[i, j] = alpha_bwd * sum over tokens of left[n, i] * right[n, j]; left is 1 where null, and the same
// column as right's where `diagonal`.
template <class T>
struct WeightGrad {
  SeedCall<T> call;
  const T* left;
  std::int64_t left_stride;
  const T* right;
  std::int64_t right_stride, columns;
  bool diagonal;
  T* to;
  ESPER_HD void operator()(std::int64_t at) const {
    const std::int64_t j = at % columns, i = diagonal ? j : at / columns;
    T sum = T(0);
    for (std::int64_t n = 0; n < call.tokens; ++n) {
      if (call.energy[n] < 0.0) continue;
      const T factor = left != nullptr ? left[n * left_stride + i] : T(1);
      sum += factor * right[n * right_stride + j];
    }
    to[at] = static_cast<T>(call.scalars.alpha_bwd) * sum;
  }
};

template <class T>
void compute_g(const SeedCall<T>& call, T* y, void* stream) {
  const std::int64_t hidden = call.tokens * call.shape.rank;
  if (call.shape.family == Family::kBottleneck) launch_each(hidden, Hidden<T>{call}, stream);
  if (call.shape.family == Family::kDepthwise) launch_each(hidden, WindowHidden<T>{call}, stream);
  if (call.shape.family == Family::kSqueezeExcite) compute_excitation(call, stream);
  launch_blocks(call.tokens, Output<T>{call, y}, stream);
}

// A gradient of `rows` x `columns`, as WeightGrad sums it over the call's tokens.
template <class T>
struct GradOf {
  const T* left;
  std::int64_t left_stride, rows;
  const T* right;
  std::int64_t right_stride, columns;
  bool diagonal = false;
};

template <class T>
void sum(const SeedCall<T>& call, T* to, const GradOf<T>& of, void* stream) {
  if (to == nullptr) return;
  launch_each(of.rows * of.columns,
              WeightGrad<T>{call, of.left, of.left_stride, of.right, of.right_stride, of.columns, of.diagonal, to},
              stream);
}

template <class T>
void backward_excitation(const SeedCall<T>& call, const SeedGrads<T>& grads, void* stream) {
  const std::int64_t samples = call.positions.samples, d = call.shape.width, r = call.shape.rank;
  launch_each(samples * d, ExciteGrad<T>{call, grads.dy}, stream);
  launch_each(samples * r, PooledHiddenGrad<T>{call}, stream);
  if (grads.dsource != nullptr) {
    launch_each(call.tokens * d, ExciteSourceGrad<T>{call, grads.dy, grads.dsource}, stream);
  }
  SeedCall<T> by_sample = call;  // the sums run over samples, of which those that are not trusted are left out
  by_sample.tokens = samples;
  by_sample.energy = call.trust;
  sum(by_sample, grads.params.A, {call.before, r, r, call.pooled(), d, d}, stream);
  sum(by_sample, grads.params.a, {nullptr, 0, 1, call.before, r, r}, stream);
  sum(by_sample, grads.params.B, {call.moved(), d, d, call.hidden, r, r}, stream);
  sum(by_sample, grads.params.b, {nullptr, 0, 1, call.moved(), d, d}, stream);
}

}  // namespace

template <class T>
const char* forward(const SeedCall<T>& call, T* y, ChunkStats* stats, void* stream) {
  compute_g(call, call.scalars.alpha_fwd != 0.0f ? y : nullptr, stream);
  if (stats != nullptr) launch_blocks(1, Telemetry<T>{call, stats}, stream);
  return launch_error();
}

template <class T>
const char* backward(const SeedCall<T>& call, const SeedGrads<T>& grads, void* stream) {
  compute_g(call, static_cast<T*>(nullptr), stream);
  const auto& shape = call.shape;
  if (shape.family == Family::kSqueezeExcite) {
    backward_excitation(call, grads, stream);
    return launch_error();
  }
  const bool input = shape.source == Source::kInput, depthwise = shape.family == Family::kDepthwise;
  const T* source = input ? call.x : call.h + shape.offset;
  const std::int64_t source_stride = input ? call.input_width : call.width;
  const std::int64_t S = shape.source_width, r = shape.rank, d = shape.width, D = call.width;
  const T* dy = grads.dy + shape.offset;
  if (shape.family != Family::kAffine) launch_each(call.tokens * r, HiddenGrad<T>{call, grads.dy}, stream);
  if (grads.dsource != nullptr && depthwise) {
    launch_each(call.tokens * r, WindowSourceGrad<T>{call, grads.dsource}, stream);
  } else if (grads.dsource != nullptr) {
    launch_each(call.tokens * S, SourceGrad<T>{call, grads.dy, grads.dsource}, stream);
  }
  if (!depthwise) {
    sum(call, grads.params.A, {source, source_stride, S, call.before, r, r}, stream);
  } else if (grads.params.A != nullptr) {
    launch_each(r * shape.window_height * shape.window_width, WindowWeightGrad<T>{call, grads.params.A}, stream);
  }
  sum(call, grads.params.a, {nullptr, 0, 1, call.before, r, r}, stream);
  sum(call, grads.params.G, {source, source_stride, S, call.gate, r, r}, stream);
  sum(call, grads.params.c, {nullptr, 0, 1, call.gate, r, r}, stream);
  if (shape.family == Family::kAffine) {
    sum(call, grads.params.B, {source, source_stride, 1, dy, D, d, true}, stream);
  } else if (depthwise) {
    sum(call, grads.params.B, {dy, D, d, call.hidden, r, r}, stream);
  } else {
    sum(call, grads.params.B, {call.hidden, r, r, dy, D, d}, stream);
  }
  sum(call, grads.params.b, {nullptr, 0, 1, dy, D, d}, stream);
  return launch_error();
}

template const char* forward<float>(const SeedCall<float>&, float*, ChunkStats*, void*);
template const char* forward<double>(const SeedCall<double>&, double*, ChunkStats*, void*);
template const char* backward<float>(const SeedCall<float>&, const SeedGrads<float>&, void*);
template const char* backward<double>(const SeedCall<double>&, const SeedGrads<double>&, void*);

}  // namespace esper::cuda
