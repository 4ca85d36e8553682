// Fused kernels of bottleneck seeds, g = act(source A + a) [* (source G + c)] B + b, for blocks of kWarps warps.
// A warp owns 16 tokens of a tile; sums stay in registers from one product to the next, as in FlashAttention
// (Dao et al., 2022), and the wide activations are read and written once, 16 bytes at a time.
#pragma once

#include "kernels/cuda/fused_of.h"
#include "kernels/cuda/tiles.cuh"

namespace esper::cuda {

ESPER_HD bool finite_float(float value) { return value - value == 0.0f; }

// What both directions have in common: kRank is the rank, rounded up to 16, 32 or 64.
template <class E, int kRank>
struct FusedSeedOf {
  static constexpr int kRankSums = kRank / 8, kRankSteps = kRank / kDepth<E>, kSlabSteps = kSlab / kDepth<E>;
  const FusedCall& call;
  const FusedSeed& seed;

  ESPER_WARP Part<const E> source(std::int64_t token, std::int64_t from) const {
    const auto& s = seed.shape;
    if (s.source == Source::kInput) {
      return part(static_cast<const E*>(call.x), call.input_width, token, call.tokens - token, from,
                  s.source_width - from);
    }
    return chunk(call.h, token, from);
  }

  ESPER_WARP Part<const E> chunk(const void* matrix, std::int64_t token, std::int64_t from) const {
    return part(static_cast<const E*>(matrix), call.width, token, call.tokens - token, seed.shape.offset + from,
                seed.shape.width - from);
  }

  ESPER_WARP Part<E> chunk(void* matrix, std::int64_t token, std::int64_t from) const {
    return part(static_cast<E*>(matrix), call.width, token, call.tokens - token, seed.shape.offset + from,
                seed.shape.width - from);
  }

  // source A + a, and source G + c where the seed is gated, for the warp's tokens.
  ESPER_WARP void hidden(const Warp& warp, std::int64_t token, E* tile, E* weights, Sums* before, Sums* gate) const {
    const auto& s = seed.shape;
    for (std::int64_t from = 0; from < s.source_width; from += kSlab) {
      warp.sync();
      load(warp, tile, source(token, from));
      add_product(warp, tile, weights, seed.params.A, from, before);
      if (!s.gated) continue;
      warp.sync();
      add_product(warp, tile, weights, seed.params.G, from, gate);
    }
    ESPER_UNROLL
    for (int j = 0; j < kRankSums; ++j) {
      add_bias(before[j], seed.params.a, 8 * j);
      if (s.gated) add_bias(gate[j], seed.params.c, 8 * j);
    }
  }

  // sums += tile * a slab of a matrix [source width, rank].
  ESPER_WARP void add_product(const Warp& warp, const E* tile, E* weights, const float* matrix, std::int64_t from,
                              Sums* sums) const {
    const std::int64_t rank = seed.shape.rank;
    load_weights(warp, weights, matrix + from * rank, rank, seed.shape.source_width - from, rank, kSlab, kRank, true);
    warp.sync();
    for (int step = 0; step < kSlabSteps; ++step) {
      const auto left = load_left(tile + 16 * warp.index() * kStride + step * kDepth<E>, kStride);
      ESPER_UNROLL
      for (int j = 0; j < kRankSums; ++j) {
        multiply(sums[j], left, load_right(weights + 8 * j * kStride + step * kDepth<E>, kStride));
      }
    }
  }

  ESPER_WARP void add_bias(Sums& sums, const float* bias, int first) const {
    if (bias == nullptr) return;
    each(sums, [&](int, int column, float& value, int) {
      if (first + column < seed.shape.rank) value += bias[first + column];
    });
  }

  // Columns [8 j, 8 j + 8) of hidden B + b from column `from` on; weights are [column, rank].
  ESPER_WARP Sums output(const Left<E>* hidden, const E* weights, std::int64_t from, int j) const {
    Sums g;
    ESPER_UNROLL
    for (int step = 0; step < kRankSteps; ++step) {
      multiply(g, hidden[step], load_right(weights + 8 * j * kStride + step * kDepth<E>, kStride));
    }
    if (seed.params.b != nullptr) {
      each(g, [&](int, int column, float& value, int) {
        const std::int64_t at = from + 8 * j + column;
        if (at < seed.shape.width) value += seed.params.b[at];
      });
    }
    return g;
  }

  // Marks rows whose hidden layer is not finite, which an activation may hide.
  ESPER_WARP void find_broken(Sums& sums, PerRow<bool>& finite) const {
    each(sums, [&](int, int, float& value, int slot) { finite.of[slot] = finite.of[slot] && finite_float(value); });
  }
};

struct Both {
  ESPER_WARP bool operator()(bool one, bool other) const { return one && other; }
};
struct Plus {
  ESPER_WARP double operator()(double one, double other) const { return one + other; }
};

template <class V>
ESPER_WARP PerRow<V> every_row(V value) {
  PerRow<V> rows;
  ESPER_UNROLL
  for (auto& row : rows.of) row = value;
  return rows;
}

template <class E, int kRank>
struct FusedForward {
  FusedCall call;
  static constexpr std::size_t kSharedBytes = Tiles<E>::bytes(2) + kTileTokens * sizeof(bool);

  ESPER_WARP void operator()(const Warp& warp, unsigned char* shared) const {
    const FusedSeedOf<E, kRank> of{call, call.seeds[warp.seed()]};
    for (std::int64_t token = warp.block() * kTileTokens; token < call.tokens;
         token += warp.blocks() * kTileTokens) {
      if (of.seed.shape.rank > kRank / 2 || kRank == 16) tile(warp, of, token, {shared});
    }
  }

  ESPER_WARP void tile(const Warp& warp, const FusedSeedOf<E, kRank>& of, std::int64_t token,
                       const Tiles<E>& tiles) const {
    using Of = FusedSeedOf<E, kRank>;
    const auto& s = of.seed.shape;
    bool* kept = reinterpret_cast<bool*>(tiles[2]);
    Sums before[Of::kRankSums], gate[Of::kRankSums];
    of.hidden(warp, token, tiles[0], tiles[1], before, gate);
    auto finite = every_row(true);
    ESPER_UNROLL
    for (int j = 0; j < Of::kRankSums; ++j) {
      of.find_broken(before[j], finite);
      if (s.gated) of.find_broken(gate[j], finite);
      each(before[j], [&](int, int, float& value, int) { value = activate(s.activation, value); });
      if (s.gated) scale(before[j], gate[j]);
    }
    Left<E> hidden[Of::kRankSteps];
    ESPER_UNROLL
    for (int step = 0; step < Of::kRankSteps; ++step) hidden[step] = chain<E>(before, step);

    auto energy = every_row(0.0);
    for (std::int64_t from = 0; from < s.width; from += kSlab) {
      warp.sync();
      load(warp, tiles[0], of.chunk(call.h, token, from));
      load_weights(warp, tiles[1], of.seed.params.B + from, s.width, s.rank, s.width - from, kRank, kSlab, true);
      warp.sync();
      E* mine = tiles[0] + 16 * warp.index() * kStride;
      for (int j = 0; j < kSlab / 8; ++j) {
        Sums g = of.output(hidden, tiles[1], from, j);
        each(g, [&](int row, int column, float& value, int slot) {
          finite.of[slot] = finite.of[slot] && finite_float(value);
          energy.of[slot] += static_cast<double>(value) * static_cast<double>(value);
          E& at = mine[row * kStride + 8 * j + column];
          at = from_float<E>(to_float(at) + of.seed.scalars.alpha_fwd * value);
        });
      }
      warp.sync();
      if (of.seed.writes) store(warp, tiles[0], of.chunk(call.y, token, from));
    }
    join(finite, Both{});
    join(energy, Plus{});
    const int first = 16 * warp.index();
    each_row(finite, [&](int row, bool whole) { kept[first + row] = whole; });
    if (of.seed.energy != nullptr) {
      each_row(energy, [&](int row, double sum) {
        if (token + first + row < call.tokens) of.seed.energy[token + first + row] = sum;
      });
    }
    warp.sync();
    contain(warp, of, token, kept);
  }

  ESPER_WARP void scale(Sums& sums, const Sums& by) const {
    ESPER_UNROLL
    for (std::size_t i = 0; i < sizeof(Sums) / sizeof(float); ++i) {
      reinterpret_cast<float*>(sums.of)[i] *= reinterpret_cast<const float*>(by.of)[i];
    }
  }

  // Tokens whose g is not finite keep h. They are rare, so they are written and then mended.
  ESPER_WARP void contain(const Warp& warp, const FusedSeedOf<E, kRank>& of, std::int64_t token,
                          const bool* kept) const {
    const auto& s = of.seed.shape;
    for (std::int64_t row = 0; row < kTileTokens && token + row < call.tokens; ++row) {
      if (kept[row]) continue;
      if (of.seed.energy != nullptr && warp.thread() == 0) of.seed.energy[token + row] = -1.0;
      const std::int64_t at = (token + row) * call.width + s.offset;
      for (std::int64_t j = warp.thread(); of.seed.writes && j < s.width; j += Warp::kThreads) {
        static_cast<E*>(call.y)[at + j] = static_cast<const E*>(call.h)[at + j];
      }
    }
  }
};

template <class E, int kRank>
struct FusedBackward {
  FusedCall call;
  // Shared memory: a tile of tokens, a turned one, weights, and the turned hidden layer with its gradients.
  enum { kTile, kTurned, kWeights, kHiddenTurned, kBeforeTurned, kGateTurned, kNumTiles };
  static constexpr std::size_t kSharedBytes = Tiles<E>::bytes(kNumTiles) + kTileTokens * sizeof(bool);
  using Of = FusedSeedOf<E, kRank>;

  ESPER_WARP void operator()(const Warp& warp, unsigned char* shared) const {
    const Of of{call, call.seeds[warp.seed()]};
    for (std::int64_t token = warp.block() * kTileTokens; token < call.tokens;
         token += warp.blocks() * kTileTokens) {
      if (of.seed.shape.rank > kRank / 2 || kRank == 16) tile(warp, of, token, {shared});
    }
  }

  ESPER_WARP void tile(const Warp& warp, const Of& of, std::int64_t token, const Tiles<E>& tiles) const {
    const auto& s = of.seed.shape;
    bool* kept = reinterpret_cast<bool*>(tiles[kNumTiles]);
    Sums before[Of::kRankSums], gate[Of::kRankSums], moved[Of::kRankSums];
    of.hidden(warp, token, tiles[kTile], tiles[kWeights], before, gate);
    auto finite = every_row(true);
    Sums hidden_sums[Of::kRankSums];
    ESPER_UNROLL
    for (int j = 0; j < Of::kRankSums; ++j) {
      of.find_broken(before[j], finite);
      if (s.gated) of.find_broken(gate[j], finite);
      ESPER_UNROLL
      for (std::size_t i = 0; i < sizeof(Sums) / sizeof(float); ++i) {
        const float value = activate(s.activation, flat(before[j])[i]);
        flat(hidden_sums[j])[i] = s.gated ? value * flat(gate[j])[i] : value;
      }
    }
    Left<E> hidden[Of::kRankSteps];
    ESPER_UNROLL
    for (int step = 0; step < Of::kRankSteps; ++step) hidden[step] = chain<E>(hidden_sums, step);

    for (std::int64_t from = 0; from < s.width; from += kSlab) {
      warp.sync();
      load(warp, tiles[kTile], of.chunk(call.dy, token, from));
      load_weights(warp, tiles[kWeights], of.seed.params.B + from, s.width, s.rank, s.width - from, kRank, kSlab,
                   true);
      warp.sync();
      for (int j = 0; j < kSlab / 8; ++j) {
        Sums g = of.output(hidden, tiles[kWeights], from, j);
        of.find_broken(g, finite);
      }
      warp.sync();
      load_weights(warp, tiles[kWeights], of.seed.params.B + from, s.width, s.rank, s.width - from, kRank, kSlab,
                   false);
      warp.sync();
      for (int step = 0; step < Of::kSlabSteps; ++step) {
        const auto left = load_left(tiles[kTile] + 16 * warp.index() * kStride + step * kDepth<E>, kStride);
        ESPER_UNROLL
        for (int j = 0; j < Of::kRankSums; ++j) {
          multiply(moved[j], left, load_right(tiles[kWeights] + 8 * j * kStride + step * kDepth<E>, kStride));
        }
      }
    }
    join(finite, Both{});
    const int first = 16 * warp.index();
    each_row(finite, [&](int row, bool whole) { kept[first + row] = whole; });
    // The gradients of the pre-activations take the places of the pre-activations.
    ESPER_UNROLL
    for (int j = 0; j < Of::kRankSums; ++j) {
      each(hidden_sums[j], [&](int row, int column, float& value, int slot) {
        keep(tiles[kHiddenTurned], first + row, 8 * j + column, value, finite.of[slot]);
      });
      ESPER_UNROLL
      for (std::size_t i = 0; i < sizeof(Sums) / sizeof(float); ++i) {
        const float u = flat(before[j])[i], du = flat(moved[j])[i];
        float slope = activate_grad(s.activation, u);
        if (s.gated) {
          slope *= flat(gate[j])[i];
          flat(gate[j])[i] = du * activate(s.activation, u);
        }
        flat(before[j])[i] = du * slope;
      }
      each(before[j], [&](int row, int column, float& value, int slot) {
        keep(tiles[kBeforeTurned], first + row, 8 * j + column, value, finite.of[slot]);
      });
      if (!s.gated) continue;
      each(gate[j], [&](int row, int column, float& value, int slot) {
        keep(tiles[kGateTurned], first + row, 8 * j + column, value, finite.of[slot]);
      });
    }
    warp.sync();
    output_gradients(warp, of, token, tiles, kept);
    source_gradients(warp, of, token, tiles, kept, before, gate);
  }

  static ESPER_WARP float* flat(Sums& sums) { return reinterpret_cast<float*>(sums.of); }

  // Notes a value of a token turned, as [rank, token]; zero, here and there, where the token is contained.
  ESPER_WARP void keep(E* turned, int token, int k, float& value, bool finite) const {
    value = finite ? value : 0.0f;
    turned[k * kStride + token] = from_float<E>(value);
  }

  ESPER_WARP float* partial(const Warp& warp, const Of& of) const {
    return of.seed.partial + warp.block() * partial_size(of.seed.shape);
  }

  // Sums over the tile's tokens of the products of two turned matrices, rows of one and 8 rows of the other.
  ESPER_WARP Sums over_tokens(const E* rows, const E* columns) const {
    Sums sums;
    for (int step = 0; step < kTileTokens / kDepth<E>; ++step) {
      multiply(sums, load_left(rows + step * kDepth<E>, kStride), load_right(columns + step * kDepth<E>, kStride));
    }
    return sums;
  }

  // to[first + column] += the sum over tokens of 8 rows of a turned matrix.
  ESPER_WARP void add_columns(float* to, const E* columns, std::int64_t first, std::int64_t end) const {
    Sums sums;
    for (int step = 0; step < kTileTokens / kDepth<E>; ++step) {
      multiply(sums, first_row_of_ones<E>(), load_right(columns + step * kDepth<E>, kStride));
    }
    each(sums, [&](int row, int column, float& value, int) {
      if (row == 0 && first + column < end) to[first + column] += value;
    });
  }

  // Of B and b.
  ESPER_WARP void output_gradients(const Warp& warp, const Of& of, std::int64_t token, const Tiles<E>& tiles,
                                   const bool* kept) const {
    const auto& s = of.seed.shape;
    if (of.seed.grads.B == nullptr && of.seed.grads.b == nullptr) return;
    float* dB = partial(warp, of) + 2 * (s.source_width + 1) * s.rank;
    float* db = dB + s.rank * s.width;
    for (std::int64_t from = 0; from < s.width; from += kSlab) {
      load_turned(warp, tiles[kTurned], of.chunk(call.dy, token, from), kept);
      warp.sync();
      for (int j = warp.index(); j < kSlab / 8; j += kWarps) {
        const E* columns = tiles[kTurned] + 8 * j * kStride;
        for (int i = 0; i < kRank / 16; ++i) {
          Sums sums = over_tokens(tiles[kHiddenTurned] + 16 * i * kStride, columns);
          each(sums, [&](int row, int column, float& value, int) {
            const std::int64_t k = 16 * i + row, at = from + 8 * j + column;
            if (k < s.rank && at < s.width) dB[k * s.width + at] += value;
          });
        }
        add_columns(db, columns, from + 8 * j, s.width);
      }
      warp.sync();
    }
  }

  // Of A, a, G, c and of the source.
  ESPER_WARP void source_gradients(const Warp& warp, const Of& of, std::int64_t token, const Tiles<E>& tiles,
                                   const bool* kept, const Sums* before, const Sums* gate) const {
    const auto& s = of.seed.shape;
    float* dA = partial(warp, of);
    float* da = dA + s.source_width * s.rank;
    float* dG = da + s.rank;
    float* dc = dG + s.source_width * s.rank;
    for (int j = warp.index(); j < Of::kRankSums; j += kWarps) {
      add_columns(da, tiles[kBeforeTurned] + 8 * j * kStride, 8 * j, s.rank);
      if (s.gated) add_columns(dc, tiles[kGateTurned] + 8 * j * kStride, 8 * j, s.rank);
    }
    Left<E> moved[Of::kRankSteps], moved_gate[Of::kRankSteps];
    ESPER_UNROLL
    for (int step = 0; step < Of::kRankSteps; ++step) {
      moved[step] = chain<E>(before, step);
      if (s.gated) moved_gate[step] = chain<E>(gate, step);
    }
    for (std::int64_t from = 0; from < s.source_width; from += kSlab) {
      if (of.seed.grads.A != nullptr || of.seed.grads.G != nullptr) {
        load_turned(warp, tiles[kTurned], of.source(token, from), kept);
        warp.sync();
        add_outer(of, tiles, tiles[kBeforeTurned], warp.index(), from, dA);
        if (s.gated) add_outer(of, tiles, tiles[kGateTurned], warp.index(), from, dG);
        warp.sync();
      }
      if (of.seed.sends) send(warp, of, token, tiles, from, moved, moved_gate);
    }
  }

  // to[s, k] += the sum over tokens of the source's feature s times `turned`, for the warp's 16 features.
  ESPER_WARP void add_outer(const Of& of, const Tiles<E>& tiles, const E* turned, int warp, std::int64_t from,
                            float* to) const {
    const auto& s = of.seed.shape;
    ESPER_UNROLL
    for (int j = 0; j < Of::kRankSums; ++j) {
      Sums sums = over_tokens(tiles[kTurned] + 16 * warp * kStride, turned + 8 * j * kStride);
      each(sums, [&](int row, int column, float& value, int) {
        const std::int64_t feature = from + 16 * warp + row, k = 8 * j + column;
        if (feature < s.source_width && k < s.rank) to[feature * s.rank + k] += value;
      });
    }
  }

  // What is added to dh or dx in a slab of the source's features.
  ESPER_WARP void send(const Warp& warp, const Of& of, std::int64_t token, const Tiles<E>& tiles, std::int64_t from,
                       const Left<E>* moved, const Left<E>* moved_gate) const {
    const auto& s = of.seed.shape;
    const bool input = s.source == Source::kInput;
    const auto at = [&](E* matrix) {
      return input ? part(matrix, call.input_width, token, call.tokens - token, from, s.source_width - from)
                   : of.chunk(static_cast<void*>(matrix), token, from);
    };
    const Part<E> to = at(static_cast<E*>(input ? call.dx : call.dh));
    const Part<E> base = input ? to : at(static_cast<E*>(const_cast<void*>(call.dh_base)));
    Sums sums[kSlab / 8];
    const auto add_product = [&](const float* matrix, const Left<E>* left) {
      load_weights(warp, tiles[kWeights], matrix + from * s.rank, s.rank, s.source_width - from, s.rank, kSlab, kRank,
                   false);
      warp.sync();
      ESPER_UNROLL
      for (int j = 0; j < kSlab / 8; ++j) {
        ESPER_UNROLL
        for (int step = 0; step < Of::kRankSteps; ++step) {
          multiply(sums[j], left[step], load_right(tiles[kWeights] + 8 * j * kStride + step * kDepth<E>, kStride));
        }
      }
      warp.sync();
    };
    load(warp, tiles[kTile], {base.data, base.stride, base.rows, base.columns});
    add_product(of.seed.params.A, moved);
    if (s.gated) add_product(of.seed.params.G, moved_gate);
    E* mine = tiles[kTile] + 16 * warp.index() * kStride;
    ESPER_UNROLL
    for (int j = 0; j < kSlab / 8; ++j) {
      each(sums[j], [&](int row, int column, float& value, int) {
        E& value_at = mine[row * kStride + 8 * j + column];
        value_at = from_float<E>(to_float(value_at) + of.seed.scalars.gamma * value);
      });
    }
    warp.sync();
    store(warp, tiles[kTile], to);
    warp.sync();
  }
};

// Whether any seed of a call has this padded rank.
inline bool has_rank(const FusedCall& call, std::int64_t padded) {
  for (int i = 0; i < call.num_seeds; ++i) {
    const std::int64_t rank = call.seeds[i].shape.rank;
    if (rank <= padded && (padded == 16 || rank > padded / 2)) return true;
  }
  return false;
}

template <template <class, int> class Body, class E, int kRank>
const char* launch_rank(const FusedCall& call, void* stream) {
  if (!has_rank(call, kRank)) return nullptr;
  using Kernel = Body<E, kRank>;
  return launch_warps(token_blocks(call.tokens), call.num_seeds, Kernel::kSharedBytes, Kernel{call}, stream);
}

template <template <class, int> class Body, class E>
const char* launch(const FusedCall& call, void* stream) {
  const char* error = launch_rank<Body, E, 16>(call, stream);
  if (error == nullptr) error = launch_rank<Body, E, 32>(call, stream);
  if (error == nullptr) error = launch_rank<Body, E, 64>(call, stream);
  return error;
}

template <class E>
const char* forward_of(const FusedCall& call, void* stream) {
  return launch<FusedForward, E>(call, stream);
}

template <class E>
const char* backward_of(const FusedCall& call, void* stream) {
  return launch<FusedBackward, E>(call, stream);
}

}  // namespace esper::cuda
