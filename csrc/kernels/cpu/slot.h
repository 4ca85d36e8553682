// The slot kernels of the CPU: what they are given, and the table of their builds per instruction set.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/cpu/capability.h"
#include "kernels/cpu/memory.h"
#include "kernels/seed.h"
#include "kernels/stats.h"

namespace esper::cpu {

// Tokens of one block: what workers divide and what backward takes at once, so that the weights'
// accumulators are read and written seldom. Forward takes fewer, as a row of h is read twice and rows that
// lie a power of two apart fight for the same lines of L1.
inline constexpr std::int64_t kBlock = 64;
inline constexpr std::int64_t kForwardBlock = 32;

// A seed whose matrices have rows padded with zeros to whole vectors ("_p" counts), so that inner loops
// have no column tails. Where no padding is needed they are the caller's own memory.
template <class T>
struct PackedSeed {
  SeedShape shape;
  SeedScalars scalars;
  std::int64_t rank_p = 0, width_p = 0, source_p = 0;
  const T *A = nullptr, *G = nullptr;   // [S, rank_p]
  const T *a = nullptr, *c = nullptr;   // [rank_p], null without
  const T* B = nullptr;                 // [r, width_p]; affine: w [width_p]
  const T* b = nullptr;                 // [width_p], null without
  const T* Bt = nullptr;                // [d, rank_p]; backward only
  const T *At = nullptr, *Gt = nullptr; // [r, source_p]; backward only, where the seed sends to its source
  T max_B = 0, max_b = 0;               // largest magnitudes; infinite where any element is not finite
  std::int64_t kept = 0;                // elements a token that seeds before it keep in SlotTensors::hidden
  bool elsewhere = false;               // other code computes it; here only its chunk is measured
  bool broken = false;                  // any parameter is not finite: every row is contained
  bool trains = false;                  // backward: wants the parameters' gradients
  bool sends = false;                   // backward: sends to its source
};

// Where the padded gradients of a seed lie in a worker's accumulator, in elements. Those of A and G are
// transposed, [r, source_p].
struct GradLayout {
  std::int64_t A = 0, a = 0, G = 0, c = 0, B = 0, b = 0, end = 0;
};

struct Columns {
  std::int64_t begin, end;
};

// What a job reads and writes, of all its tokens or of some: rows of features.
template <class T>
struct SlotTensors {
  const T* h = nullptr;   // [tokens, width]
  const T* x = nullptr;   // [tokens, input_width]
  T* y = nullptr;         // forward: [tokens, width]
  const T* dy = nullptr;  // backward: [tokens, width]
  T* dh = nullptr;        // backward: [tokens, width] or null
  T* dx = nullptr;        // backward: [tokens, input_width] or null
  T* hidden = nullptr;    // or null: of all tokens; forward writes pre-activations there, backward reads them
  std::int64_t first = 0; // which of the job's tokens the first row is
  bool past = false;      // whether y and dh are stored past the cache
};

// Results of at least so many bytes are stored past the cache: nobody finds them in L2 any more, and lines
// that are written as a whole need not be fetched before.
inline constexpr std::int64_t kPastCache = 4 << 20;

// How the elements of a tensor are stored.
enum class Element { kNative, kBFloat16, kHalf };

// A tensor [tokens, features] as it lies in memory: token t at (t / inner) * outer + (t % inner) * token, and
// feature f * feature elements further. Features lie side by side (feature = 1), or tokens do (token = 1).
struct View {
  Element element = Element::kNative;
  void* data = nullptr;  // only read where the tensor is an input
  std::int64_t inner = 1, outer = 0, token = 0, feature = 1;
};

template <class T>
struct SlotJob {
  std::int64_t tokens = 0, width = 0, input_width = 0;
  std::vector<PackedSeed<T>> seeds;
  std::vector<GradLayout> grads;  // per seed; backward only
  std::vector<Columns> copied;    // columns of h (backward: of dy) that no seed writes to y (to dh)
  std::int64_t scratch = 0;       // elements that one worker needs
  bool telemetry = false;
  std::unique_ptr<T[], FreeMemory> arena;  // owns what was packed
};

template <class T>
struct SlotKernels {
  std::int64_t lanes;
  // Rows [first, last) of the tensors. `scratch` holds job.scratch elements aligned to 64 bytes; `stats` one
  // entry per seed, merged into where job.telemetry.
  void (*forward)(const SlotJob<T>& job, const SlotTensors<T>& tensors, std::int64_t first,
                  std::int64_t last, T* scratch, ChunkStats* stats);
  // Adds the parameters' gradients, not yet times alpha_bwd, to `accumulator` at job.grads.
  void (*backward)(const SlotJob<T>& job, const SlotTensors<T>& tensors, std::int64_t first,
                   std::int64_t last, T* scratch, T* accumulator);
  // Telemetry of rows [rows, width] of one chunk, `stride` elements apart, in blocks of `block` rows.
  ChunkStats (*measure)(const T* h, std::int64_t rows, std::int64_t width, std::int64_t stride,
                        std::int64_t block);
  // Sum of the squares of `count` elements; what overflows T is infinite.
  double (*square_sum)(const T* values, std::int64_t count);
  // [rows, columns] with `stride` elements a row to [columns, to_stride], zeros beyond `rows`. `to_stride` is
  // a whole number of vectors.
  void (*transpose)(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, T* to,
                    std::int64_t to_stride);
  // Tokens [first, first + rows) of a tensor to a tile [rows, features], and back.
  void (*gather)(const View& from, std::int64_t first, std::int64_t rows, std::int64_t features, T* tile);
  void (*scatter)(const T* tile, std::int64_t rows, std::int64_t features, std::int64_t first,
                  const View& to);
};

// The build for the instruction set in use.
template <class T>
const SlotKernels<T>& slot_kernels();

}  // namespace esper::cpu
