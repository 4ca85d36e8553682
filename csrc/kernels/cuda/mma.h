// Products of small tiles by one warp, for two compilers. nvcc makes tensor-core instructions of them
// (mma.sync, PTX ISA 9.7.14); a plain C++ compiler lets one CPU thread do what a warp does, so that the
// arithmetic of a kernel and its use of shared memory can be tested without a GPU. Layouts of fragments over
// lanes are the hardware's and are not emulated.
//
// A tile of elements in shared memory is [rows, k] with k side by side, both for the left operand [16, k] and for the
// right one, which is given turned, [8 columns, k]. Elements are bfloat16, float16, or float32 rounded to TF32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/math.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include <barrier>
#include <thread>
#include <vector>
#endif

namespace esper::cuda {

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

ESPER_HD float to_float(float value) { return value; }
ESPER_HD float to_float(BFloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

#if defined(__CUDACC__)
ESPER_HD float to_float(Half value) { return __half2float(__half(__half_raw{value.bits})); }
#else
inline float to_float(Half value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (value.bits >> 10) & 31u, fraction = value.bits & 1023u;
  if (exponent == 0) {  // zero and subnormals: multiples of 2^-24
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
#endif

// Rounded to the nearest, ties to even.
template <class E>
ESPER_HD E from_float(float value) {
  if constexpr (std::is_same_v<E, float>) {
    return value;
  } else if constexpr (std::is_same_v<E, BFloat16>) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return {0x7fc0u};
    return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
  } else {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65520 and above
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the multiple of 2^-24 in the last bits
      float aligned;
      std::memcpy(&aligned, &magnitude, sizeof(aligned));
      aligned += 0.5f;
      std::memcpy(&bits, &aligned, sizeof(bits));
      return {static_cast<std::uint16_t>(sign | (bits - 0x3f000000u))};
    }
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
    return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
#endif
  }
}

// Arrays of fragments stay in registers only where every index is known when the code is compiled.
#if defined(__CUDACC__)
#define ESPER_UNROLL _Pragma("unroll")
#else
#define ESPER_UNROLL
#endif

// How far k of one product goes.
template <class E>
inline constexpr int kDepth = std::is_same_v<E, float> ? 8 : 16;

inline constexpr int kWarps = 4;

#if defined(__CUDACC__)

#define ESPER_WARP __device__ __forceinline__

// A thread of a block of kWarps warps.
struct Warp {
  static constexpr int kThreads = 32 * kWarps;
  ESPER_WARP int thread() const { return static_cast<int>(threadIdx.x); }
  ESPER_WARP int index() const { return static_cast<int>(threadIdx.x) / 32; }
  ESPER_WARP std::int64_t block() const { return blockIdx.x; }
  ESPER_WARP std::int64_t blocks() const { return gridDim.x; }
  ESPER_WARP std::int64_t seed() const { return blockIdx.y; }
  ESPER_WARP void sync() const { __syncthreads(); }
};

// The 16 x 8 sums of a product, four in each lane: rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
struct Sums {
  float of[4] = {0.0f, 0.0f, 0.0f, 0.0f};
};
template <class E>
struct Left {
  std::uint32_t words[4];
};
template <class E>
struct Right {
  std::uint32_t words[2];
};
// One value for each row of a Sums, the same in all four lanes that share the row once it is reduced.
template <class V>
struct PerRow {
  V of[2];
};

ESPER_WARP int lane_row() { return (static_cast<int>(threadIdx.x) % 32) / 4; }
ESPER_WARP int lane_pair() { return static_cast<int>(threadIdx.x) % 4; }

template <class E>
ESPER_WARP std::uint32_t two(const E* from) {
  return *reinterpret_cast<const std::uint32_t*>(from);
}
ESPER_WARP std::uint32_t rounded(float value) {
  std::uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
  return word;
}

// The hardware wants columns t and t + 4 of float32 in a lane; the order of k is free as long as both operands
// have the same, so a lane takes 2 t and 2 t + 1, which lie side by side and are what Sums holds as well.
template <class E>
ESPER_WARP Left<E> load_left(const E* tile, int stride) {
  const E* upper = tile + lane_row() * stride + 2 * lane_pair();
  const E* lower = upper + 8 * stride;
  if constexpr (std::is_same_v<E, float>) {
    return {{rounded(upper[0]), rounded(lower[0]), rounded(upper[1]), rounded(lower[1])}};
  } else {
    return {{two(upper), two(lower), two(upper + 8), two(lower + 8)}};
  }
}

template <class E>
ESPER_WARP Right<E> load_right(const E* tile, int stride) {
  const E* row = tile + lane_row() * stride + 2 * lane_pair();
  if constexpr (std::is_same_v<E, float>) {
    return {{rounded(row[0]), rounded(row[1])}};
  } else {
    return {{two(row), two(row + 8)}};
  }
}

template <class E>
ESPER_WARP std::uint32_t packed(float low, float high) {
  return from_float<E>(low).bits | static_cast<std::uint32_t>(from_float<E>(high).bits) << 16;
}

// Columns [kDepth * step, kDepth * (step + 1)) of sums as the left operand of the next product.
template <class E>
ESPER_WARP Left<E> chain(const Sums* sums, int step) {
  if constexpr (std::is_same_v<E, float>) {
    const auto& of = sums[step].of;
    return {{rounded(of[0]), rounded(of[2]), rounded(of[1]), rounded(of[3])}};
  } else {
    const auto &low = sums[2 * step].of, &high = sums[2 * step + 1].of;
    return {{packed<E>(low[0], low[1]), packed<E>(low[2], low[3]), packed<E>(high[0], high[1]),
             packed<E>(high[2], high[3])}};
  }
}

// A left operand whose first row is 1 and whose others are 0, to sum columns with.
template <class E>
ESPER_WARP Left<E> first_row_of_ones() {
  std::uint32_t one = 0;
  if constexpr (std::is_same_v<E, float>) {
    one = rounded(1.0f);
  } else {
    one = packed<E>(1.0f, 1.0f);
  }
  if (lane_row() != 0) one = 0;
  return {{one, 0, one, 0}};
}

// sums += left * right. The types differ in nothing but the name of the instruction.
#define ESPER_MULTIPLY(E, shape_and_types)                                                               \
  ESPER_WARP void multiply(Sums& sums, const Left<E>& left, const Right<E>& right) {                     \
    asm volatile("mma.sync.aligned." shape_and_types                                                     \
                 " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                \
                 : "+f"(sums.of[0]), "+f"(sums.of[1]), "+f"(sums.of[2]), "+f"(sums.of[3])                \
                 : "r"(left.words[0]), "r"(left.words[1]), "r"(left.words[2]), "r"(left.words[3]),       \
                   "r"(right.words[0]), "r"(right.words[1]));                                            \
  }
ESPER_MULTIPLY(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
ESPER_MULTIPLY(Half, "m16n8k16.row.col.f32.f16.f16.f32")
ESPER_MULTIPLY(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef ESPER_MULTIPLY

// visit(row, column, value, index of the row in a PerRow) for every sum that this thread holds.
template <class Visit>
ESPER_WARP void each(Sums& sums, Visit visit) {
  const int row = lane_row(), column = 2 * lane_pair();
  visit(row, column, sums.of[0], 0);
  visit(row, column + 1, sums.of[1], 0);
  visit(row + 8, column, sums.of[2], 1);
  visit(row + 8, column + 1, sums.of[3], 1);
}

// visit(row, value) for every row, by one thread each.
template <class V, class Visit>
ESPER_WARP void each_row(const PerRow<V>& rows, Visit visit) {
  if (lane_pair() != 0) return;
  visit(lane_row(), rows.of[0]);
  visit(lane_row() + 8, rows.of[1]);
}

// What the threads that share a row have found, joined in a fixed order of lanes.
template <class V, class Join>
ESPER_WARP void join(PerRow<V>& rows, Join join_two) {
  for (auto& value : rows.of) {
    value = join_two(value, __shfl_xor_sync(0xffffffffu, value, 1));
    value = join_two(value, __shfl_xor_sync(0xffffffffu, value, 2));
  }
}

template <class Body>
__global__ void __launch_bounds__(Warp::kThreads) warp_kernel(const __grid_constant__ Body body) {
  extern __shared__ ::uint4 shared[];
  body(Warp{}, reinterpret_cast<unsigned char*>(shared));
}

// body(warp, shared) in every thread of blocks x seeds blocks; null, or what went wrong.
template <class Body>
const char* launch_warps(std::int64_t blocks, std::int64_t seeds, std::size_t shared_bytes, const Body& body,
                         void* stream) {
  if (blocks == 0 || seeds == 0) return nullptr;
  const auto kernel = &warp_kernel<Body>;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {  // has to be asked for
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(seeds));
  kernel<<<grid, Warp::kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(body);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else  // emulation: one CPU thread for each warp

#define ESPER_WARP inline

class Warp {
 public:
  static constexpr int kThreads = kWarps;
  Warp(int index, std::int64_t block, std::int64_t blocks, std::int64_t seed, std::barrier<>& barrier)
      : index_(index), block_(block), blocks_(blocks), seed_(seed), barrier_(barrier) {}
  int thread() const { return index_; }
  int index() const { return index_; }
  std::int64_t block() const { return block_; }
  std::int64_t blocks() const { return blocks_; }
  std::int64_t seed() const { return seed_; }
  void sync() const { barrier_.arrive_and_wait(); }

 private:
  int index_;
  std::int64_t block_, blocks_, seed_;
  std::barrier<>& barrier_;
};

struct Sums {
  float of[16][8] = {};
};
template <class E>
struct Left {
  float of[16][kDepth<E>];
};
template <class E>
struct Right {
  float of[8][kDepth<E>];
};
template <class V>
struct PerRow {
  V of[16];
};

template <class E>
Left<E> load_left(const E* tile, int stride) {
  Left<E> left;
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth<E>; ++k) left.of[row][k] = to_float(tile[row * stride + k]);
  }
  return left;
}

template <class E>
Right<E> load_right(const E* tile, int stride) {
  Right<E> right;
  for (int column = 0; column < 8; ++column) {
    for (int k = 0; k < kDepth<E>; ++k) right.of[column][k] = to_float(tile[column * stride + k]);
  }
  return right;
}

template <class E>
Left<E> chain(const Sums* sums, int step) {
  Left<E> left;
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth<E>; ++k) {
      const int column = step * kDepth<E> + k;
      left.of[row][k] = to_float(from_float<E>(sums[column / 8].of[row][column % 8]));
    }
  }
  return left;
}

template <class E>
Left<E> first_row_of_ones() {
  Left<E> left = {};
  for (int k = 0; k < kDepth<E>; ++k) left.of[0][k] = 1.0f;
  return left;
}

template <class E>
void multiply(Sums& sums, const Left<E>& left, const Right<E>& right) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (int k = 0; k < kDepth<E>; ++k) sums.of[row][column] += left.of[row][k] * right.of[column][k];
    }
  }
}

template <class Visit>
void each(Sums& sums, Visit visit) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) visit(row, column, sums.of[row][column], row);
  }
}

template <class V, class Visit>
void each_row(const PerRow<V>& rows, Visit visit) {
  for (int row = 0; row < 16; ++row) visit(row, rows.of[row]);
}

template <class V, class Join>
void join(PerRow<V>&, Join) {}

template <class Body>
const char* launch_warps(std::int64_t blocks, std::int64_t seeds, std::size_t shared_bytes, const Body& body,
                         void*) {
  struct alignas(16) Line {
    unsigned char bytes[16];
  };
  for (std::int64_t seed = 0; seed < seeds; ++seed) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      std::vector<Line> shared((shared_bytes + 15) / 16);
      std::barrier<> barrier(kWarps);
      std::vector<std::thread> warps;
      for (int index = 0; index < kWarps; ++index) {
        warps.emplace_back(
            [&, index] { body(Warp(index, block, blocks, seed, barrier), shared.front().bytes); });
      }
      for (auto& warp : warps) warp.join();
    }
  }
  return nullptr;
}

#endif

}  // namespace esper::cuda
