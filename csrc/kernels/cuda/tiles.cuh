// Tiles of shared memory: tokens by features, or turned, read from memory and written to it 16 bytes at a time
// where rows allow it.
#pragma once

#include "kernels/cuda/fused.h"
#include "kernels/cuda/mma.h"

namespace esper::cuda {

inline constexpr int kSlab = 64;  // features of a tile
// Rows are padded so that the lanes of a fragment meet different banks, and stay multiples of 16 bytes.
inline constexpr int kStride = kSlab + 8;
static_assert(kTileTokens == 16 * kWarps);

// Whether rows of `stride` elements from `data` on can be taken 16 bytes at a time.
template <class E>
ESPER_WARP bool in_lines(const E* data, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride * sizeof(E) % 16 == 0;
}

struct alignas(16) Line {
  std::uint32_t words[4];
};

// A part of a matrix in memory: `rows` x `columns` from `data` on. What lies beyond reads as zero.
template <class E>
struct Part {
  E* data;
  std::int64_t stride, rows, columns;
};

template <class E>
ESPER_WARP Part<E> part(E* matrix, std::int64_t stride, std::int64_t row, std::int64_t rows, std::int64_t column,
                        std::int64_t columns) {
  return {matrix + row * stride + column, stride, rows < kTileTokens ? rows : kTileTokens,
          columns < kSlab ? columns : kSlab};
}

// visit(row, column, line of elements) over a tile of kTileTokens x kSlab, a line for each thread in turn.
template <class E, class Visit>
ESPER_WARP void each_line(const Warp& warp, const Part<const E>& from, Visit visit) {
  constexpr int kPerLine = sizeof(Line) / sizeof(E), kLines = kSlab / kPerLine;
  const bool lines = in_lines(from.data, from.stride);
  for (int i = warp.thread(); i < kTileTokens * kLines; i += Warp::kThreads) {
    const int row = i / kLines, column = i % kLines * kPerLine;
    alignas(16) E values[kPerLine];
    if (lines && row < from.rows && column + kPerLine <= from.columns) {
      *reinterpret_cast<Line*>(values) = *reinterpret_cast<const Line*>(from.data + row * from.stride + column);
    } else {
      for (int j = 0; j < kPerLine; ++j) {
        const bool inside = row < from.rows && column + j < from.columns;
        values[j] = inside ? from.data[row * from.stride + column + j] : from_float<E>(0.0f);
      }
    }
    visit(row, column, values);
  }
}

template <class E>
ESPER_WARP void load(const Warp& warp, E* tile, const Part<const E>& from) {
  each_line<E>(warp, from, [&](int row, int column, const E* values) {
    *reinterpret_cast<Line*>(tile + row * kStride + column) = *reinterpret_cast<const Line*>(values);
  });
}

// Turned: features by tokens. Tokens that are not kept are zero.
template <class E>
ESPER_WARP void load_turned(const Warp& warp, E* tile, const Part<const E>& from, const bool* kept) {
  each_line<E>(warp, from, [&](int row, int column, const E* values) {
    for (int j = 0; j < static_cast<int>(sizeof(Line) / sizeof(E)); ++j) {
      tile[(column + j) * kStride + row] = kept[row] ? values[j] : from_float<E>(0.0f);
    }
  });
}

template <class E>
ESPER_WARP void store(const Warp& warp, const E* tile, const Part<E>& to) {
  constexpr int kPerLine = sizeof(Line) / sizeof(E), kLines = kSlab / kPerLine;
  const bool lines = in_lines(to.data, to.stride);
  for (int i = warp.thread(); i < kTileTokens * kLines; i += Warp::kThreads) {
    const int row = i / kLines, column = i % kLines * kPerLine;
    if (row >= to.rows) continue;
    const E* values = tile + row * kStride + column;
    E* target = to.data + row * to.stride + column;
    if (lines && column + kPerLine <= to.columns) {
      *reinterpret_cast<Line*>(target) = *reinterpret_cast<const Line*>(values);
    } else {
      for (int j = 0; j < kPerLine && column + j < to.columns; ++j) target[j] = values[j];
    }
  }
}

// Weights w[outer, inner] of `outer` x `inner`, in memory with inner side by side, to a tile that has inner side
// by side as well, or turned. Zero beyond.
template <class E>
ESPER_WARP void load_weights(const Warp& warp, E* tile, const float* from, std::int64_t stride, std::int64_t outer,
                             std::int64_t inner, int outer_room, int inner_room, bool turned) {
  for (int i = warp.thread(); i < outer_room * inner_room; i += Warp::kThreads) {
    const int o = i / inner_room, n = i % inner_room;
    const float value = o < outer && n < inner ? from[o * stride + n] : 0.0f;
    tile[turned ? n * kStride + o : o * kStride + n] = from_float<E>(value);
  }
}

// The matrices that a block works on, each kSlab rows of kStride.
template <class E>
struct Tiles {
  static constexpr std::size_t kSize = static_cast<std::size_t>(kSlab) * kStride;
  static constexpr std::size_t bytes(int count) { return count * kSize * sizeof(E); }
  unsigned char* shared;
  ESPER_WARP E* operator[](int i) const { return reinterpret_cast<E*>(shared) + i * kSize; }
};

}  // namespace esper::cuda
