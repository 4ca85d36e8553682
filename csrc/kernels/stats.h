// Telemetry of one chunk: what is counted, and how two counts merge without cancellation.
#pragma once

#include <array>

#include "kernels/math.h"

namespace esper {

// With h the host's chunk of width d and its N tokens:
//   count           N * d elements
//   mean            mean of all elements
//   m2              sum of (h[n, j] - mean)^2
//   dead            elements with |h[n, j]| < 1e-12
//   neighbour_cov   sum over n and j of (h[n, j] - mean) * (h[n, (j + 1) mod d] - mean). Features are taken
//                   as a ring, so that both factors run over the same elements: neighbour_cov / m2 is a
//                   correlation in [-1, 1], and merging is exact.
//   nonfinite_rows  tokens whose g has a non-finite element, and which therefore kept h
//   g_energy        sum of g^2 over the other tokens
//   h_energy        sum of h^2
inline constexpr std::array<const char*, 8> kStatsColumns = {
    "count", "mean", "m2", "dead", "neighbour_cov", "nonfinite_rows", "g_energy", "h_energy"};
inline constexpr int kNumStats = static_cast<int>(kStatsColumns.size());

struct ChunkStats {
  double count, mean, m2, dead, neighbour_cov, nonfinite_rows, g_energy, h_energy;
};
static_assert(sizeof(ChunkStats) == kNumStats * sizeof(double), "a row of the stats tensor");

// Chan, Golub and LeVeque (1979), pairwise update of mean and centred second moments.
ESPER_HD void merge(ChunkStats& into, const ChunkStats& other) {
  if (other.count > 0.0) {
    const double total = into.count + other.count;
    const double delta = other.mean - into.mean;
    const double between = delta * delta * (into.count * other.count / total);
    into.mean = into.count > 0.0 ? into.mean + delta * (other.count / total) : other.mean;
    into.m2 += other.m2 + (into.count > 0.0 ? between : 0.0);
    into.neighbour_cov += other.neighbour_cov + (into.count > 0.0 ? between : 0.0);
    into.count = total;
  }
  into.dead += other.dead;
  into.nonfinite_rows += other.nonfinite_rows;
  into.g_energy += other.g_energy;
  into.h_energy += other.h_energy;
}

}  // namespace esper
