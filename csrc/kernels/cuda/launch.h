// Launches kernels from one source for two compilers. nvcc makes CUDA kernels of them; a plain C++ compiler
// runs the same code on the CPU, one thread for each CUDA thread of a block and a barrier for
// __syncthreads(), so that a machine without a GPU can test it. Warp intrinsics and atomics are not covered.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>


namespace esper::cuda {

inline constexpr int kThreads = 128;

struct Thread {
  __device__ int index() const { return static_cast<int>(threadIdx.x); }
  __device__ std::int64_t block() const { return blockIdx.x; }
  __device__ std::int64_t blocks() const { return gridDim.x; }
  __device__ void sync() const { __syncthreads(); }
};

template <class Body>
__global__ void block_kernel(Body body) {
  __shared__ typename Body::Shared shared;
  body(Thread{}, shared);
}

template <class Body>
__global__ void each_kernel(std::int64_t count, Body body) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    body(i);
  }
}

inline constexpr std::int64_t kMaxBlocks = 1 << 20;

// body(thread, shared) in every thread of `blocks` blocks of kThreads.
template <class Body>
void launch_blocks(std::int64_t blocks, const Body& body, void* stream) {
  if (blocks == 0) return;
  const auto grid = static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  block_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(body);
}

// body(i) for every i in [0, count).
template <class Body>
void launch_each(std::int64_t count, const Body& body, void* stream) {
  if (count == 0) return;
  const std::int64_t blocks = (count + kThreads - 1) / kThreads;
  const auto grid = static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  each_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(count, body);
}

// Null, or what the last launch of this thread complained about.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace esper::cuda

#define ESPER_DEVICE __device__

#else  // emulation

#include <barrier>
#include <thread>
#include <vector>

namespace esper::cuda {

inline constexpr int kThreads = 8;

class Thread {
 public:
  Thread(int index, std::int64_t block, std::int64_t blocks, std::barrier<>& barrier)
      : index_(index), block_(block), blocks_(blocks), barrier_(barrier) {}
  int index() const { return index_; }
  std::int64_t block() const { return block_; }
  std::int64_t blocks() const { return blocks_; }
  void sync() const { barrier_.arrive_and_wait(); }

 private:
  int index_;
  std::int64_t block_, blocks_;
  std::barrier<>& barrier_;
};

template <class Body>
void launch_blocks(std::int64_t blocks, const Body& body, void*) {
  typename Body::Shared shared;
  std::barrier<> barrier(kThreads);
  std::vector<std::thread> threads;
  for (int index = 0; index < kThreads; ++index) {
    threads.emplace_back([&, index] {
      for (std::int64_t block = 0; block < blocks; ++block) {
        body(Thread(index, block, blocks, barrier), shared);
        barrier.arrive_and_wait();  // a block's shared memory ends with the block
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

template <class Body>
void launch_each(std::int64_t count, const Body& body, void*) {
  for (std::int64_t i = 0; i < count; ++i) body(i);
}

inline const char* launch_error() { return nullptr; }

}  // namespace esper::cuda

#define ESPER_DEVICE

#endif
