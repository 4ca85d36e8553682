// Schedules of the blending factor alpha.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace esper {

enum class ScheduleKind : std::uint8_t { kLinear = 0, kCosine = 1, kSigmoid = 2, kDrift = 3 };

inline constexpr int kNumScheduleKinds = 4;
inline constexpr std::array<const char*, kNumScheduleKinds> kScheduleNames = {
    "linear", "cosine", "sigmoid", "drift"};

// Shape of a schedule at progress p in [0, 1]; exactly 0 at 0 and exactly 1 at 1.
inline double schedule_shape(ScheduleKind kind, double p) {
  if (p <= 0.0) return 0.0;
  if (p >= 1.0) return 1.0;
  switch (kind) {
    case ScheduleKind::kCosine:
      return 0.5 * (1.0 - std::cos(3.14159265358979323846 * p));
    case ScheduleKind::kSigmoid: {
      // The logistic curve over [-6, 6], stretched so that it meets its ends.
      constexpr double kHalfWidth = 6.0;
      const auto logistic = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
      const double low = logistic(-kHalfWidth);
      return (logistic(kHalfWidth * (2.0 * p - 1.0)) - low) / (1.0 - 2.0 * low);
    }
    default:
      return p;
  }
}

// Part of a step that a drift-controlled schedule takes: a whole one while the host's output does not
// move, half of one when cosine and norm drift together equal the tolerance.
inline double drift_rate(double cosine, double norm, double tolerance) {
  return 1.0 / (1.0 + (cosine + norm) / tolerance);
}

}  // namespace esper
