// What spatial seeds compute on CUDA beside what slot.cu computes for every seed. Tensors are
// [samples, positions, features] with features last.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/cuda/slot.h"

namespace esper::cuda {

template <class T>
ESPER_HD bool is_finite(T value) {
  return value - value == T(0);
}

template <class T>
ESPER_HD const T* source_row(const SeedCall<T>& call, std::int64_t n) {
  return call.shape.source == Source::kInput ? call.x + n * call.input_width
                                             : call.h + n * call.width + call.shape.offset;
}

// The tokens that a token's window covers, or those whose windows cover it: calls visit(token, index in the
// window) for those that exist.
template <class Visit>
ESPER_HD void each_in_window(const SeedShape& shape, const Positions& positions, std::int64_t n, int direction,
                             Visit visit) {
  const std::int64_t x = n % positions.width, y = n / positions.width % positions.height;
  for (std::int64_t ky = 0; ky < shape.window_height; ++ky) {
    const std::int64_t dy = direction * (ky - shape.window_height / 2);
    if (y + dy < 0 || y + dy >= positions.height) continue;
    for (std::int64_t kx = 0; kx < shape.window_width; ++kx) {
      const std::int64_t dx = direction * (kx - shape.window_width / 2);
      if (x + dx < 0 || x + dx >= positions.width) continue;
      visit(n + dy * positions.width + dx, ky * shape.window_width + kx);
    }
  }
}

// ------------------------------------------------------------------------------------- depthwise

template <class T>
struct WindowHidden {  // hidden[n, c] and its pre-activation
  SeedCall<T> call;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t rank = call.shape.rank, n = i / rank, c = i % rank;
    const std::int64_t window = call.shape.window_height * call.shape.window_width;
    T before = call.params.a != nullptr ? call.params.a[c] : T(0);
    const T* weights = call.params.A + c * window;
    each_in_window(call.shape, call.positions, n, 1, [&](std::int64_t token, std::int64_t k) {
      before += weights[k] * source_row(call, token)[c];
    });
    call.before[i] = before;
    call.hidden[i] = activate(call.shape.activation, before);
  }
};

template <class T>
struct WindowSourceGrad {  // before holds its gradient, zero for contained tokens
  SeedCall<T> call;
  T* to;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t rank = call.shape.rank, n = i / rank, c = i % rank;
    const std::int64_t window = call.shape.window_height * call.shape.window_width;
    const T* weights = call.params.A + c * window;
    T sum = T(0);
    each_in_window(call.shape, call.positions, n, -1, [&](std::int64_t token, std::int64_t k) {
      if (call.energy[token] >= 0.0) sum += weights[k] * call.before[token * rank + c];
    });
    const bool input = call.shape.source == Source::kInput;
    to[input ? n * call.input_width + c : n * call.width + call.shape.offset + c] +=
        static_cast<T>(call.scalars.gamma) * sum;
  }
};

template <class T>
struct WindowWeightGrad {  // to[c, k]
  SeedCall<T> call;
  T* to;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t window = call.shape.window_height * call.shape.window_width;
    const std::int64_t c = i / window, wanted = i % window;
    T sum = T(0);
    for (std::int64_t n = 0; n < call.tokens; ++n) {
      if (call.energy[n] < 0.0) continue;
      each_in_window(call.shape, call.positions, n, 1, [&](std::int64_t token, std::int64_t k) {
        if (k == wanted) sum += call.before[n * call.shape.rank + c] * source_row(call, token)[c];
      });
    }
    to[i] = static_cast<T>(call.scalars.alpha_bwd) * sum;
  }
};

// ------------------------------------------------------------------------------------- squeeze-excite

template <class T>
struct Pool {  // pooled[n, j] of each sample
  SeedCall<T> call;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t width = call.shape.width, n = i / width, j = i % width;
    const std::int64_t positions = call.positions.per_sample();
    T sum = T(0);
    for (std::int64_t p = 0; p < positions; ++p) sum += source_row(call, n * positions + p)[j];
    call.pooled()[i] = sum / static_cast<T>(positions);
  }
};

template <class T>
struct PooledHidden {
  SeedCall<T> call;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t rank = call.shape.rank, width = call.shape.width, n = i / rank, k = i % rank;
    T before = call.params.a != nullptr ? call.params.a[k] : T(0);
    for (std::int64_t s = 0; s < width; ++s) before += call.params.A[k * width + s] * call.pooled()[n * width + s];
    call.before[i] = before;
    call.hidden[i] = activate(call.shape.activation, before);
  }
};

template <class T>
struct Excite {  // gate[n, j] from its pre-activation, which is kept where it is not finite
  SeedCall<T> call;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t rank = call.shape.rank, width = call.shape.width, n = i / width, j = i % width;
    T before = call.params.b != nullptr ? call.params.b[j] : T(0);
    for (std::int64_t k = 0; k < rank; ++k) before += call.params.B[j * rank + k] * call.hidden[n * rank + k];
    call.excite()[i] = is_finite(before) ? tanh_of(before) : before;
  }
};

// Marks samples that cannot be trusted, as tokens that are contained are marked.
template <class T>
struct Trust {
  SeedCall<T> call;
  ESPER_HD void operator()(std::int64_t n) const {
    const std::int64_t rank = call.shape.rank, width = call.shape.width;
    bool finite = true;
    for (std::int64_t j = 0; j < width; ++j) {
      finite = finite && is_finite(call.pooled()[n * width + j]) && is_finite(call.excite()[n * width + j]);
    }
    for (std::int64_t k = 0; k < rank; ++k) finite = finite && is_finite(call.before[n * rank + k]);
    call.trust[n] = finite ? 0.0 : -1.0;
  }
};

template <class T>
struct ExciteGrad {  // moved[n, j]: gradient of the gate's pre-activation
  SeedCall<T> call;
  const T* dy;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t width = call.shape.width, n = i / width, j = i % width;
    const std::int64_t positions = call.positions.per_sample();
    if (call.trust[n] < 0.0) {
      call.moved()[i] = T(0);
      return;
    }
    T sum = T(0);
    for (std::int64_t p = n * positions; p < (n + 1) * positions; ++p) {
      sum += dy[p * call.width + call.shape.offset + j] * source_row(call, p)[j];
    }
    const T gate = call.excite()[i];
    call.moved()[i] = sum * (T(1) - gate * gate);
  }
};

template <class T>
struct PooledHiddenGrad {  // before becomes its gradient
  SeedCall<T> call;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t rank = call.shape.rank, width = call.shape.width, n = i / rank, k = i % rank;
    if (call.trust[n] < 0.0) return;
    T sum = T(0);
    for (std::int64_t j = 0; j < width; ++j) sum += call.moved()[n * width + j] * call.params.B[j * rank + k];
    call.before[i] = sum * activate_grad(call.shape.activation, call.before[i]);
  }
};

template <class T>
struct ExciteSourceGrad {
  SeedCall<T> call;
  const T* dy;
  T* to;
  ESPER_HD void operator()(std::int64_t i) const {
    const std::int64_t rank = call.shape.rank, width = call.shape.width, token = i / width, j = i % width;
    const std::int64_t n = token / call.positions.per_sample();
    if (call.trust[n] < 0.0) return;
    T back = T(0);
    for (std::int64_t k = 0; k < rank; ++k) back += call.params.A[k * width + j] * call.before[n * rank + k];
    const T grad = call.excite()[n * width + j] * dy[token * call.width + call.shape.offset + j] +
                   back / static_cast<T>(call.positions.per_sample());
    const bool input = call.shape.source == Source::kInput;
    to[input ? token * call.input_width + j : token * call.width + call.shape.offset + j] +=
        static_cast<T>(call.scalars.gamma) * grad;
  }
};

template <class T>
void compute_excitation(const SeedCall<T>& call, void* stream) {
  const std::int64_t samples = call.positions.samples;
  launch_each(samples * call.shape.width, Pool<T>{call}, stream);
  launch_each(samples * call.shape.rank, PooledHidden<T>{call}, stream);
  launch_each(samples * call.shape.width, Excite<T>{call}, stream);
  launch_each(samples, Trust<T>{call}, stream);
}

}  // namespace esper::cuda
