// Growth probes as operators on the CPU. They are internal: esper/kasmina/growth.py makes every argument, so
// only what memory safety needs is checked.
#include "kernels/cpu/growth.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace esper {
namespace {

struct Probe {
  cpu::GrowthShape shape{};
  std::vector<cpu::GrowthChunk> chunks;
};

void check(const at::Tensor& tensor, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous() &&
                        tensor.sizes() == shape,
                    name, " is ", tensor.toString(), tensor.sizes(),
                    " but must be contiguous, of type float32, on the CPU and of shape ", shape);
}

Probe make_probe(std::int64_t rows, std::int64_t width, std::int64_t input_width, std::int64_t basis,
                 at::IntArrayRef bounds) {
  Probe probe;
  auto& shape = probe.shape;
  TORCH_CHECK_VALUE(!bounds.empty() && bounds.size() % 2 == 0, "bounds must hold pairs");
  for (std::size_t i = 0; i < bounds.size(); i += 2) {
    TORCH_CHECK_VALUE(0 <= bounds[i] && bounds[i] < bounds[i + 1] && bounds[i + 1] <= width, "bounds are ",
                      bounds, " but must be ranges within the width ", width);
    probe.chunks.push_back({bounds[i], bounds[i + 1]});
    shape.chunk_width = std::max(shape.chunk_width, bounds[i + 1] - bounds[i]);
  }
  shape.rows = rows;
  shape.width = width;
  shape.input_width = input_width;
  shape.basis = basis;
  shape.num_chunks = static_cast<std::int64_t>(probe.chunks.size());
  shape.chunks = probe.chunks.data();
  return probe;
}

at::Tensor growth_basis(const at::Tensor& h, const std::optional<at::Tensor>& x,
                        const std::optional<at::Tensor>& input_omega, const at::Tensor& output_omega,
                        const at::Tensor& offset, at::IntArrayRef bounds, bool linear) {
  constexpr auto kF = cpu::kGrowthFeatures;
  TORCH_CHECK_VALUE(h.dim() == 2, "h must have 2 axes");
  TORCH_CHECK_VALUE(x.has_value() == input_omega.has_value(), "x and input_omega must come together");
  const auto input_width = x.has_value() ? x->size(-1) : 0;
  const auto probe = make_probe(h.size(0), h.size(1), input_width, linear ? 2 * kF : kF, bounds);
  const auto& shape = probe.shape;
  const auto groups = shape.num_chunks + x.has_value();
  check(h, {shape.rows, shape.width}, "h");
  check(output_omega, {shape.num_chunks, shape.chunk_width, kF}, "output_omega");
  check(offset, {groups, 1, kF}, "offset");
  if (x.has_value()) {
    check(*x, {shape.rows, input_width}, "x");
    check(*input_omega, {input_width, kF}, "input_omega");
  }
  auto basis = at::empty({groups, shape.rows, shape.basis}, h.options());
  cpu::growth_kernels().basis(shape, h.const_data_ptr<float>(),
                              x.has_value() ? x->const_data_ptr<float>() : nullptr,
                              x.has_value() ? input_omega->const_data_ptr<float>() : nullptr,
                              output_omega.const_data_ptr<float>(), offset.const_data_ptr<float>(),
                              basis.mutable_data_ptr<float>());
  return basis;
}

bool growth_accumulate(const at::Tensor& basis, const at::Tensor& v, double scale, at::IntArrayRef bounds,
                       bool reads_input, at::Tensor gram, at::Tensor input, at::Tensor output,
                       at::Tensor energy) {
  TORCH_CHECK_VALUE(basis.dim() == 3 && v.dim() == 2, "basis must have 3 axes and v 2");
  const auto probe = make_probe(v.size(0), v.size(1), reads_input, basis.size(2), bounds);
  const auto& shape = probe.shape;
  const auto groups = shape.num_chunks + reads_input;
  check(v, {shape.rows, shape.width}, "v");
  check(basis, {groups, shape.rows, shape.basis}, "basis");
  check(gram, {groups, shape.basis, shape.basis}, "gram");
  check(input, {shape.width, shape.basis}, "input");
  check(output, {shape.num_chunks, shape.chunk_width, shape.basis}, "output");
  check(energy, {shape.width}, "energy");
  TORCH_CHECK_VALUE(shape.basis == cpu::kGrowthFeatures || shape.basis == 2 * cpu::kGrowthFeatures,
                    "basis has ", shape.basis, " functions");
  return cpu::growth_kernels().accumulate(
      shape, basis.const_data_ptr<float>(), v.const_data_ptr<float>(), static_cast<float>(scale),
      gram.mutable_data_ptr<float>(), input.mutable_data_ptr<float>(), output.mutable_data_ptr<float>(),
      energy.mutable_data_ptr<float>());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(esper, m) {
  m.def(
      "growth_basis(Tensor h, Tensor? x, Tensor? input_omega, Tensor output_omega, Tensor offset, "
      "int[] bounds, bool linear) -> Tensor");
  m.def(
      "growth_accumulate(Tensor basis, Tensor v, float scale, int[] bounds, bool reads_input, "
      "Tensor(a!) gram, Tensor(b!) input, Tensor(c!) output, Tensor(d!) energy) -> bool");
}

TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("growth_basis", &growth_basis);
  m.impl("growth_accumulate", &growth_accumulate);
}

}  // namespace esper
