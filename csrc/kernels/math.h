// Elementwise mathematics, shared by the CPU and the CUDA kernels. Branch-free in fp32, so that loops over
// these functions vectorise; fp64 is exact to the library's last digits and serves gradient checks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ESPER_HD __host__ __device__ __forceinline__
#else
#define ESPER_HD inline __attribute__((always_inline))
#endif

namespace esper {

enum class Activation : std::int64_t { kIdentity = 0, kRelu = 1, kGelu = 2, kSilu = 3, kTanh = 4 };
inline constexpr int kNumActivations = 5;

ESPER_HD double exp_of(double x) { return ::exp(x); }
ESPER_HD double erf_of(double x) { return ::erf(x); }
ESPER_HD double tanh_of(double x) { return ::tanh(x); }

#if defined(__CUDA_ARCH__)
ESPER_HD float exp_of(float x) { return ::expf(x); }
ESPER_HD float erf_of(float x) { return ::erff(x); }
ESPER_HD float tanh_of(float x) { return ::tanhf(x); }
#else
// exp by range reduction to [-ln2/2, ln2/2] and a polynomial (the constants of Cephes' expf).
ESPER_HD float exp_of(float x) {
  // NaN passes both comparisons unchanged.
  const float bounded = x > 88.37626f ? 88.37626f : (x < -87.33654f ? -87.33654f : x);
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer without a call.
  constexpr float kRound = 12582912.0f;
  const float n = (bounded * 1.44269504088896341f + kRound) - kRound;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n through the exponent bits. A NaN has no integer, so it is kept out of the conversion.
  const float whole = n == n ? n : 0.0f;
  const std::int32_t bits = (static_cast<std::int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

// erf(x) = x P(x^2) on [-3.92, 3.92], where |erf| has become 1 to the last digit: P fitted in the variable
// u = 2 x^2 / 3.92^2 - 1, in which the magnitudes of its coefficients add up to 1.13 and nothing cancels.
// At most 4e-7 off. A rational form has half as many terms, but a division takes as long as all of these.
ESPER_HD float erf_of(float x) {
  const float t = x > 3.92f ? 3.92f : (x < -3.92f ? -3.92f : x);
  const float u = t * t * (2.0f / (3.92f * 3.92f)) - 1.0f;
  float p = -8.439160301e-04f;
  p = p * u + 2.098753816e-03f;
  p = p * u + -1.394580235e-03f;
  p = p * u + 1.919987844e-03f;
  p = p * u + -7.660469972e-03f;
  p = p * u + 1.420992985e-02f;
  p = p * u + -1.999506913e-02f;
  p = p * u + 2.969758026e-02f;
  p = p * u + -4.343684763e-02f;
  p = p * u + 5.839599296e-02f;
  p = p * u + -7.401981950e-02f;
  p = p * u + 9.059697390e-02f;
  p = p * u + -1.091792285e-01f;
  p = p * u + 1.340845525e-01f;
  p = p * u + -1.801086217e-01f;
  p = p * u + 3.607368171e-01f;
  return t * p;
}

// Rational approximation on [-7.905, 7.905] (Eigen's); at most a few ulp off.
ESPER_HD float tanh_of(float x) {
  const float t = x > 7.9053111f ? 7.9053111f : (x < -7.9053111f ? -7.9053111f : x);
  const float s = t * t;
  float p = -2.76076847742355e-16f;
  p = p * s + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  float q = 1.19825839466702e-06f;
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return t * p / q;
}
#endif

template <Activation kKind, class T>
ESPER_HD T activate(T x) {
  if constexpr (kKind == Activation::kRelu) {
    return x < T(0) ? T(0) : x;
  } else if constexpr (kKind == Activation::kGelu) {
    return T(0.5) * x * (T(1) + erf_of(x * T(0.70710678118654752440)));
  } else if constexpr (kKind == Activation::kSilu) {
    return x / (T(1) + exp_of(-x));
  } else if constexpr (kKind == Activation::kTanh) {
    return tanh_of(x);
  } else {
    return x;
  }
}

// Derivative with respect to the pre-activation x.
template <Activation kKind, class T>
ESPER_HD T activate_grad(T x) {
  if constexpr (kKind == Activation::kRelu) {
    return x > T(0) ? T(1) : T(0);
  } else if constexpr (kKind == Activation::kGelu) {
    const T cdf = T(0.5) * (T(1) + erf_of(x * T(0.70710678118654752440)));
    return cdf + x * T(0.39894228040143267794) * exp_of(T(-0.5) * x * x);
  } else if constexpr (kKind == Activation::kSilu) {
    const T s = T(1) / (T(1) + exp_of(-x));
    return s * (T(1) + x * (T(1) - s));
  } else if constexpr (kKind == Activation::kTanh) {
    const T t = tanh_of(x);
    return T(1) - t * t;
  } else {
    return T(1);
  }
}

template <class T>
struct Activated {
  T value, grad;
};

// Both at once: GELU, SiLU and tanh share their costly part.
template <Activation kKind, class T>
ESPER_HD Activated<T> activate_with_grad(T x) {
  if constexpr (kKind == Activation::kGelu) {
    const T cdf = T(0.5) * (T(1) + erf_of(x * T(0.70710678118654752440)));
    return {x * cdf, cdf + x * T(0.39894228040143267794) * exp_of(T(-0.5) * x * x)};
  } else if constexpr (kKind == Activation::kSilu) {
    const T s = T(1) / (T(1) + exp_of(-x));
    return {x * s, s * (T(1) + x * (T(1) - s))};
  } else if constexpr (kKind == Activation::kTanh) {
    const T t = tanh_of(x);
    return {t, T(1) - t * t};
  } else {
    return {activate<kKind>(x), activate_grad<kKind>(x)};
  }
}

// The same with the activation known at run time only.
template <class T>
ESPER_HD T activate(Activation kind, T x) {
  switch (kind) {
    case Activation::kRelu:
      return activate<Activation::kRelu>(x);
    case Activation::kGelu:
      return activate<Activation::kGelu>(x);
    case Activation::kSilu:
      return activate<Activation::kSilu>(x);
    case Activation::kTanh:
      return activate<Activation::kTanh>(x);
    default:
      return x;
  }
}

template <class T>
ESPER_HD T activate_grad(Activation kind, T x) {
  switch (kind) {
    case Activation::kRelu:
      return activate_grad<Activation::kRelu>(x);
    case Activation::kGelu:
      return activate_grad<Activation::kGelu>(x);
    case Activation::kSilu:
      return activate_grad<Activation::kSilu>(x);
    case Activation::kTanh:
      return activate_grad<Activation::kTanh>(x);
    default:
      return T(1);
  }
}

}  // namespace esper
