// The fused CUDA kernels as a plain library: one forward or backward of one seed, called from the test by ctypes.
#include "kernels/cuda/fused.cu"
#include "kernels/cuda/fused_bfloat16.cu"
#include "kernels/cuda/fused_half.cu"
#include "kernels/cuda/fused_tf32.cu"

namespace cuda = esper::cuda;

namespace {

// `numbers`: element, offset, width, source width, rank, source, activation, gated, tokens, D, D_in, sends.
// `pointers`: A a G c B b, h, x, energy.
cuda::FusedCall one_seed(const long long* numbers, const float* scalars, void** pointers) {
  cuda::FusedCall call;
  call.element = static_cast<cuda::FusedElement>(numbers[0]);
  call.num_seeds = 1;
  auto& seed = call.seeds[0];
  seed.shape.offset = numbers[1];
  seed.shape.width = numbers[2];
  seed.shape.source_width = numbers[3];
  seed.shape.rank = numbers[4];
  seed.shape.source = static_cast<esper::Source>(numbers[5]);
  seed.shape.activation = static_cast<esper::Activation>(numbers[6]);
  seed.shape.gated = numbers[7] != 0;
  call.tokens = numbers[8];
  call.width = numbers[9];
  call.input_width = numbers[10];
  seed.sends = numbers[11] != 0;
  seed.scalars = {scalars[0], scalars[1], scalars[2]};
  auto** p = reinterpret_cast<float**>(pointers);
  seed.params = {p[0], p[1], p[2], p[3], p[4], p[5]};
  call.h = pointers[6];
  call.x = pointers[7];
  seed.energy = static_cast<double*>(pointers[8]);
  return call;
}

}  // namespace

extern "C" {

void fused_forward(const long long* numbers, const float* scalars, void** pointers, void* y, double* stats) {
  auto call = one_seed(numbers, scalars, pointers);
  call.y = y;
  call.seeds[0].writes = scalars[0] != 0.0f;
  cuda::fused_forward(call, nullptr);
  std::vector<esper::ChunkStats> partial(static_cast<std::size_t>(cuda::token_blocks(call.tokens)));
  cuda::chunk_stats(call.element, call.h, call.tokens, call.width, call.seeds[0].shape, call.seeds[0].energy,
                    partial.data(), reinterpret_cast<esper::ChunkStats*>(stats), nullptr);
}

// `grads`: A a G c B b, dh, dx. dh and dx hold what the seed adds to.
void fused_backward(const long long* numbers, const float* scalars, void** pointers, const void* dy, void** grads) {
  auto call = one_seed(numbers, scalars, pointers);
  auto& seed = call.seeds[0];
  auto** p = reinterpret_cast<float**>(grads);
  seed.grads = {p[0], p[1], p[2], p[3], p[4], p[5]};
  call.dy = dy;
  call.dh_base = dy;
  call.dh = grads[6];
  call.dx = grads[7];
  std::vector<float> partial(static_cast<std::size_t>(cuda::token_blocks(call.tokens) * cuda::partial_size(seed.shape)));
  seed.partial = partial.data();
  cuda::fused_backward(call, nullptr);
}
}
