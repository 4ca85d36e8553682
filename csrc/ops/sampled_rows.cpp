// The rows that telemetry looks at, as operators on the CPU: drawn, gathered and measured without gradients or
// temporaries. They are internal (esper/kasmina/rows.py and telemetry.py make every argument), so only what
// memory safety needs is checked.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rand.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "kernels/cpu/slot.h"

namespace esper {
namespace {

// One row from each of `most` stretches of equal length, drawn by the number of the step alone.
at::Tensor draw_rows(std::int64_t num_rows, std::int64_t most, std::int64_t step) {
  TORCH_CHECK_VALUE(0 < most && most <= num_rows, "most is ", most, " but there are ", num_rows, " rows");
  const auto generator = at::detail::createCPUGenerator(static_cast<std::uint64_t>(step));
  const auto within = at::rand({most}, generator, at::TensorOptions().dtype(at::kDouble));
  const auto index = at::empty({most}, at::TensorOptions().dtype(at::kLong));
  const double stretch = static_cast<double>(num_rows) / static_cast<double>(most);
  const auto* shift = within.const_data_ptr<double>();
  auto* to = index.mutable_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < most; ++i) {
    const auto row = static_cast<std::int64_t>((static_cast<double>(i) + shift[i]) * stretch);
    to[i] = std::min(row, num_rows - 1);
  }
  return index;
}

// Where a row of a tensor [..., D] begins, in elements.
std::int64_t offset_of(const at::Tensor& tensor, std::int64_t row) {
  std::int64_t offset = 0;
  for (auto dim = tensor.dim() - 2; dim >= 0; --dim) {
    offset += row % tensor.size(dim) * tensor.stride(dim);
    row /= tensor.size(dim);
  }
  return offset;
}

// Rows of a tensor [..., D] in any layout, all of them without an index: [rows, D], in float64 as they are and
// in float32 otherwise.
at::Tensor take_rows(const at::Tensor& tensor, const std::optional<at::Tensor>& index) {
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.dim() > 0, "tensor must lie on the CPU and have an axis");
  const auto width = tensor.size(-1);
  const auto available = width == 0 ? 0 : tensor.numel() / width;
  TORCH_CHECK_VALUE(!index.has_value() || (index->is_cpu() && index->scalar_type() == at::kLong &&
                                           index->dim() == 1 && index->is_contiguous()),
                    "index must be a vector of int64 on the CPU");
  const auto rows = index.has_value() ? index->numel() : available;
  const auto* numbers = index.has_value() ? index->const_data_ptr<std::int64_t>() : nullptr;
  const auto type = tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto result = at::empty({rows, width}, tensor.options().dtype(type));
  const auto stride = tensor.stride(-1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, tensor.scalar_type(), "take_rows", [&] {
    using Result = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto* from = tensor.const_data_ptr<scalar_t>();
    auto* to = result.mutable_data_ptr<Result>();
    for (std::int64_t n = 0; n < rows; ++n, to += width) {
      const auto number = numbers == nullptr ? n : numbers[n];
      TORCH_CHECK_VALUE(0 <= number && number < available, "index holds ", number, " of ", available, " rows");
      const auto* row = from + offset_of(tensor, number);
      if (stride == 1) {
        std::copy_n(row, width, to);
      } else {
        for (std::int64_t j = 0; j < width; ++j) to[j] = static_cast<Result>(row[j * stride]);
      }
    }
  });
  return result;
}

template <class T>
void measure(const at::Tensor& rows, std::int64_t step, at::IntArrayRef seeds, at::IntArrayRef bounds,
             ChunkStats* stats) {
  constexpr std::int64_t kTile = 1 << 16;  // as many rows at once as the operators of computing seeds take
  const auto width = rows.size(1);
  auto block = cpu::kForwardBlock;
  if (step > 1) block = std::clamp<std::int64_t>(kTile / width / 16 * 16, 16, block);
  const auto count = (rows.size(0) + step - 1) / step;
  const auto* data = rows.const_data_ptr<T>();
  for (std::size_t i = 0; i < seeds.size(); ++i) {
    const auto own = bounds[2 * i + 1] - bounds[2 * i];
    merge(stats[seeds[i]],
          cpu::slot_kernels<T>().measure(data + bounds[2 * i], count, own, step * width, block));
  }
}

// Merges the telemetry of chunks in which no seed computes into the statistics of their seeds: every step-th
// of the rows [N, D] is looked at. Chunk i holds columns [bounds[2 i], bounds[2 i + 1]).
void measure_chunks(const at::Tensor& rows, std::int64_t step, at::IntArrayRef seeds, at::IntArrayRef bounds,
                    at::Tensor stats) {
  TORCH_CHECK_VALUE(rows.is_cpu() && rows.dim() == 2 && rows.is_contiguous() && step > 0,
                    "rows must be a contiguous matrix on the CPU");
  TORCH_CHECK_VALUE(stats.is_cpu() && stats.scalar_type() == at::kDouble && stats.is_contiguous() &&
                        stats.dim() == 2 && stats.size(1) == kNumStats,
                    "stats must be [seeds, ", kNumStats, "] in float64");
  TORCH_CHECK_VALUE(bounds.size() == 2 * seeds.size(), "bounds must hold a pair for each seed");
  for (std::size_t i = 0; i < seeds.size(); ++i) {
    const auto begin = bounds[2 * i], end = bounds[2 * i + 1];
    TORCH_CHECK_VALUE(0 <= seeds[i] && seeds[i] < stats.size(0), "seeds holds ", seeds[i]);
    TORCH_CHECK_VALUE(0 <= begin && begin < end && end <= rows.size(1), "bounds are ", bounds);
  }
  auto* to = reinterpret_cast<ChunkStats*>(stats.mutable_data_ptr<double>());
  if (rows.scalar_type() == at::kDouble) {
    measure<double>(rows, step, seeds, bounds, to);
  } else {
    measure<float>(rows, step, seeds, bounds, to);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(esper, m) {
  m.def("draw_rows(int num_rows, int most, int step) -> Tensor", &draw_rows);
  m.def("take_rows(Tensor tensor, Tensor? index) -> Tensor");
  m.def("measure_chunks(Tensor rows, int step, int[] seeds, int[] bounds, Tensor(a!) stats) -> ()");
}

TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("take_rows", &take_rows);
  m.impl("measure_chunks", &measure_chunks);
}

}  // namespace esper
