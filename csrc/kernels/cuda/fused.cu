// Launches of the fused kernels, and what surrounds them: sums of the partial gradients, telemetry.
#include "kernels/cuda/fused_of.h"
#include "kernels/cuda/launch.h"

namespace esper::cuda {
namespace {

// The partial sums of all token blocks in their order, scaled.
struct Reduce {
  FusedSeed seed;
  std::int64_t blocks;
  ESPER_HD void operator()(std::int64_t i) const {
    const auto& s = seed.shape;
    const std::int64_t size = partial_size(s);
    const std::int64_t sizes[] = {s.source_width * s.rank, s.rank, s.source_width * s.rank,
                                  s.rank,                  s.rank * s.width, s.width};
    float* const grads[] = {seed.grads.A, seed.grads.a, seed.grads.G, seed.grads.c, seed.grads.B, seed.grads.b};
    std::int64_t at = i;
    int which = 0;
    while (at >= sizes[which]) at -= sizes[which++];
    if (grads[which] == nullptr) return;
    float sum = 0.0f;
    for (std::int64_t block = 0; block < blocks; ++block) sum += seed.partial[block * size + i];
    grads[which][at] = seed.scalars.alpha_bwd * sum;
  }
};

// Telemetry of a block's share of the tokens: each thread its tokens, then the threads in order.
template <class E>
struct ShareStats {
  struct Shared {
    ChunkStats part[kThreads];
  };
  const E* h;
  std::int64_t tokens, width;
  SeedShape shape;
  const double* energy;
  ChunkStats* partial;

  ESPER_DEVICE void operator()(const Thread& thread, Shared& shared) const {
    ChunkStats own{};
    const std::int64_t stride = thread.blocks() * kThreads;
    for (std::int64_t n = thread.block() * kThreads + thread.index(); n < tokens; n += stride) {
      merge(own, of_token(h + n * width + shape.offset, energy[n]));
    }
    shared.part[thread.index()] = own;
    thread.sync();
    if (thread.index() != 0) return;
    for (int t = 1; t < kThreads; ++t) merge(shared.part[0], shared.part[t]);
    partial[thread.block()] = shared.part[0];
  }

  ESPER_DEVICE ChunkStats of_token(const E* row, double g_energy) const {
    const double shift = static_cast<double>(to_float(row[0]));
    double sum = 0.0, square = 0.0, neighbour = 0.0;
    ChunkStats stats{};
    for (std::int64_t j = 0; j < shape.width; ++j) {
      const float value = to_float(row[j]);
      const double centred = static_cast<double>(value) - shift;
      const double next = static_cast<double>(to_float(row[j + 1 < shape.width ? j + 1 : 0])) - shift;
      sum += centred;
      square += centred * centred;
      neighbour += centred * next;
      stats.dead += value < 1e-12f && value > -1e-12f ? 1.0 : 0.0;
    }
    stats.count = static_cast<double>(shape.width);
    stats.mean = shift + sum / stats.count;
    stats.m2 = square - sum * sum / stats.count;
    stats.m2 = stats.m2 < 0.0 ? 0.0 : stats.m2;
    stats.neighbour_cov = neighbour - sum * sum / stats.count;
    stats.h_energy = stats.m2 + stats.count * stats.mean * stats.mean;
    stats.nonfinite_rows = g_energy < 0.0 ? 1.0 : 0.0;
    stats.g_energy = g_energy < 0.0 ? 0.0 : g_energy;
    return stats;
  }
};

struct MergeStats {
  const ChunkStats* partial;
  std::int64_t blocks;
  ChunkStats* stats;
  ESPER_HD void operator()(std::int64_t) const {
    ChunkStats all = partial[0];
    for (std::int64_t block = 1; block < blocks; ++block) merge(all, partial[block]);
    *stats = all;
  }
};

}  // namespace

const char* fused_forward(const FusedCall& call, void* stream) {
  switch (call.element) {
    case FusedElement::kBFloat16:
      return forward_of<BFloat16>(call, stream);
    case FusedElement::kHalf:
      return forward_of<Half>(call, stream);
    default:
      return forward_of<float>(call, stream);
  }
}

const char* fused_backward(const FusedCall& call, void* stream) {
  const char* error = call.element == FusedElement::kBFloat16 ? backward_of<BFloat16>(call, stream)
                      : call.element == FusedElement::kHalf   ? backward_of<Half>(call, stream)
                                                              : backward_of<float>(call, stream);
  for (int i = 0; error == nullptr && i < call.num_seeds; ++i) {
    launch_each(partial_size(call.seeds[i].shape), Reduce{call.seeds[i], token_blocks(call.tokens)}, stream);
    error = launch_error();
  }
  return error;
}

const char* chunk_stats(FusedElement element, const void* h, std::int64_t tokens, std::int64_t width,
                        const SeedShape& shape, const double* energy, ChunkStats* partial, ChunkStats* stats,
                        void* stream) {
  const std::int64_t blocks = token_blocks(tokens);
  const auto run = [&](auto element_of) {
    using E = decltype(element_of);
    launch_blocks(blocks, ShareStats<E>{static_cast<const E*>(h), tokens, width, shape, energy, partial}, stream);
  };
  if (element == FusedElement::kBFloat16) {
    run(BFloat16{});
  } else if (element == FusedElement::kHalf) {
    run(Half{});
  } else {
    run(float{});
  }
  launch_each(1, MergeStats{partial, blocks, stats}, stream);
  return launch_error();
}

}  // namespace esper::cuda
