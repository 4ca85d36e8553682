// The CUDA kernels as a plain library: one forward or backward of one seed, called from the test by ctypes.
#include "kernels/cuda/slot.cu"

using esper::ChunkStats;
namespace cuda = esper::cuda;

namespace {

// `numbers`: offset, width, source width, rank, source, family, activation, gated, tokens, D, D_in, samples,
// height and width of the positions, height and width of the window.
// `pointers`: A a G c B b, h, x, before, gate, hidden, g, energy, vectors, trust.
cuda::SeedCall<double> seed_call(const long long* numbers, const float* scalars, void** pointers) {
  cuda::SeedCall<double> call;
  call.shape.offset = numbers[0];
  call.shape.width = numbers[1];
  call.shape.source_width = numbers[2];
  call.shape.rank = numbers[3];
  call.shape.source = static_cast<esper::Source>(numbers[4]);
  call.shape.family = static_cast<esper::Family>(numbers[5]);
  call.shape.activation = static_cast<esper::Activation>(numbers[6]);
  call.shape.gated = numbers[7] != 0;
  call.tokens = numbers[8];
  call.width = numbers[9];
  call.input_width = numbers[10];
  call.positions = {numbers[11], numbers[12], numbers[13]};
  call.shape.window_height = numbers[14];
  call.shape.window_width = numbers[15];
  call.scalars = {scalars[0], scalars[1], scalars[2]};
  auto** p = reinterpret_cast<double**>(pointers);
  call.params = {p[0], p[1], p[2], p[3], p[4], p[5]};
  call.h = p[6];
  call.x = p[7];
  call.before = p[8];
  call.gate = p[9];
  call.hidden = p[10];
  call.g = p[11];
  call.energy = p[12];
  call.vectors = p[13];
  call.trust = p[14];
  return call;
}

}  // namespace

extern "C" {

void emulated_forward(const long long* numbers, const float* scalars, void** pointers, double* y,
                      double* stats) {
  cuda::forward<double>(seed_call(numbers, scalars, pointers), y, reinterpret_cast<ChunkStats*>(stats), nullptr);
}

// `grads`: A a G c B b, dsource.
void emulated_backward(const long long* numbers, const float* scalars, void** pointers, const double* dy,
                       void** grads) {
  auto** p = reinterpret_cast<double**>(grads);
  cuda::SeedGrads<double> to;
  to.dy = dy;
  to.params = {p[0], p[1], p[2], p[3], p[4], p[5]};
  to.dsource = p[6];
  cuda::backward<double>(seed_call(numbers, scalars, pointers), to, nullptr);
}
}
