// The Python face of esper._C: build facts, lifecycle, seed bank, slot programs and telemetry merge. Importing it also
// registers the torch operators of csrc/ops.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "build_facts.h"
#include "kernels/cpu/capability.h"
#include "kernels/stats.h"
#include "ops/plan.h"
#include "ops/program.h"
#include "ops/recycled.h"
#include "seedbank/seed_bank.h"

namespace py = pybind11;

namespace {

using esper::SeedBank;
using esper::State;

// A view of the bank's memory that keeps the bank alive.
template <class T>
py::array view(py::object self, const T* data, std::vector<py::ssize_t> shape, bool writable) {
  py::array array(py::dtype::of<T>(), std::move(shape), data, self);
  if (!writable) {
    py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  }
  return array;
}

State checked_state(std::int64_t id, const char* name) {
  if (id < 0 || id >= esper::kNumStates) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(id) +
                                " but must be in [0, " + std::to_string(esper::kNumStates) + ")");
  }
  return static_cast<State>(id);
}

using Rows = py::array_t<double, py::array::c_style>;

void merge_stats(Rows into, const Rows& other) {
  for (const Rows* rows : {static_cast<const Rows*>(&into), &other}) {
    if (rows->ndim() != 2 || rows->shape(1) != esper::kNumStats || rows->shape(0) != into.shape(0)) {
      throw std::invalid_argument("acc and other must both be [rows, " +
                                  std::to_string(esper::kNumStats) + "] with the same number of rows");
    }
  }
  auto* a = reinterpret_cast<esper::ChunkStats*>(into.mutable_data());
  const auto* b = reinterpret_cast<const esper::ChunkStats*>(other.data());
  for (py::ssize_t row = 0; row < into.shape(0); ++row) esper::merge(a[row], b[row]);
}

void bind_seed_bank(py::module_& m) {
  // index() checks slot and seed, so every method that names a seed goes through it.
  const auto at = [](auto method) {
    return [method](SeedBank& bank, std::int64_t slot, std::int64_t seed) {
      return method(bank, bank.index(slot, seed));
    };
  };
  py::class_<SeedBank>(m, "SeedBank")
      .def(py::init<const std::vector<std::int64_t>&, std::int64_t>(), py::arg("seeds_per_slot"),
           py::arg("embargo_steps") = 0)
      .def_property_readonly("num_seeds", &SeedBank::num_seeds)
      .def_property_readonly("num_slots", &SeedBank::num_slots)
      .def_property_readonly("embargo_steps", &SeedBank::embargo_steps)
      .def("index", &SeedBank::index, py::arg("slot"), py::arg("seed"))
      .def("state", at([](SeedBank& b, std::size_t i) { return static_cast<int>(b.state(i)); }),
           py::arg("slot"), py::arg("seed"))
      .def("alpha", at([](SeedBank& b, std::size_t i) { return b.alpha(i); }), py::arg("slot"),
           py::arg("seed"))
      .def("muted", at([](SeedBank& b, std::size_t i) { return b.muted(i); }), py::arg("slot"),
           py::arg("seed"))
      .def("frozen", at([](SeedBank& b, std::size_t i) { return b.frozen(i); }), py::arg("slot"),
           py::arg("seed"))
      .def("embargo_remaining", at([](SeedBank& b, std::size_t i) { return b.embargo_remaining(i); }),
           py::arg("slot"), py::arg("seed"))
      .def(
          "advance",
          [](SeedBank& b, std::int64_t slot, std::int64_t seed, std::int64_t to) {
            b.advance(b.index(slot, seed), to);
          },
          py::arg("slot"), py::arg("seed"), py::arg("to_state"))
      .def(
          "set_schedule",
          [](SeedBank& b, std::int64_t slot, std::int64_t seed, const std::string& kind,
             std::int64_t steps, double start, double end, double tolerance) {
            b.set_schedule(b.index(slot, seed), kind, steps, start, end, tolerance);
          },
          py::arg("slot"), py::arg("seed"), py::arg("kind"), py::arg("steps"), py::arg("start") = 0.0,
          py::arg("end") = 1.0, py::arg("tolerance") = 1.0)
      .def(
          "set_drift",
          [](SeedBank& b, std::int64_t slot, std::int64_t seed, double cosine, double norm) {
            b.set_drift(b.index(slot, seed), cosine, norm);
          },
          py::arg("slot"), py::arg("seed"), py::arg("cosine"), py::arg("norm"))
      .def("drift_ramps", &SeedBank::drift_ramps, py::arg("slot"))
      .def(
          "set_alpha",
          [](SeedBank& b, std::int64_t slot, std::int64_t seed, double alpha) {
            b.set_alpha(b.index(slot, seed), alpha);
          },
          py::arg("slot"), py::arg("seed"), py::arg("alpha"))
      .def(
          "set_frozen",
          [](SeedBank& b, std::int64_t slot, std::int64_t seed, bool frozen) {
            b.set_frozen(b.index(slot, seed), frozen);
          },
          py::arg("slot"), py::arg("seed"), py::arg("frozen"))
      .def(
          "set_muted",
          [](SeedBank& b, std::int64_t slot, std::int64_t seed, bool muted) {
            b.set_muted(b.index(slot, seed), muted);
          },
          py::arg("slot"), py::arg("seed"), py::arg("muted"))
       .def(
          "set_embargo",
          [](SeedBank& b, std::int64_t slot, std::int64_t seed, std::int64_t steps) {
            b.set_embargo(b.index(slot, seed), steps);
          },
          py::arg("slot"), py::arg("seed"), py::arg("steps"))
      .def(
          "set_plan",
          [](SeedBank& b, std::int64_t slot, std::int64_t seed, const std::vector<std::int64_t>& record) {
            b.set_plan(b.index(slot, seed), record);
          },
          py::arg("slot"), py::arg("seed"), py::arg("record"))
      .def("plan", &SeedBank::plan, py::arg("slot"))
      .def("tick", &SeedBank::tick)
      .def("scalars",
           [](py::object self) {
             auto& b = self.cast<SeedBank&>();
             return view(self, static_cast<const float*>(b.scalars()), {b.num_seeds(), 3}, true);
           })
      .def("states",
           [](py::object self) {
             auto& b = self.cast<SeedBank&>();
             return view(self, b.states(), {b.num_seeds()}, false);
           })
      .def("alphas",
           [](py::object self) {
             auto& b = self.cast<SeedBank&>();
             return view(self, b.alphas(), {b.num_seeds()}, false);
           })
      .def("progress",
           [](py::object self) {
             auto& b = self.cast<SeedBank&>();
             return view(self, b.progress(), {b.num_seeds()}, false);
           })
      .def("embargoes",
           [](py::object self) {
             auto& b = self.cast<SeedBank&>();
             return view(self, b.embargoes(), {b.num_seeds()}, false);
           })
      .def("plans",
           [](py::object self) {
             auto& b = self.cast<SeedBank&>();
             return view(self, b.plans(), {b.num_seeds(), esper::kPlanWidth}, false);
           })
      .def("to_bytes", [](const SeedBank& b) { return py::bytes(b.to_bytes()); })
      .def_static(
          "from_bytes",
          [](const py::bytes& data) { return SeedBank::from_bytes(std::string_view(data)); },
          py::arg("data"))
      .def(
          "__deepcopy__", [](const SeedBank& b, const py::dict&) { return SeedBank(b); },
          py::arg("memo"));
}

// The parameters of modules, each given with their names, in one list. They are looked up in each call.
py::list collect_parameters(const py::list& owners) {
  static const auto* const attribute = new py::str("_parameters");
  py::list tensors;
  for (const py::handle owner : owners) {
    const auto pair = owner.cast<py::tuple>();
    const py::dict parameters = pair[0].attr(*attribute);
    for (const py::handle name : pair[1].cast<py::tuple>()) tensors.append(py::object(parameters[name]));
  }
  return tensors;
}

// None where the operator has to be called.
py::object run_program(const esper::SlotProgram& program, py::handle h, py::handle x, const py::list& params,
                       py::handle scalars, bool telemetry, bool direct) {
  const auto is_plain = [](py::handle object) { return THPVariable_CheckExact(object.ptr()); };
  if (at::impl::torch_function_mode_enabled() || !is_plain(h) || !(x.is_none() || is_plain(x)) ||
      !is_plain(scalars) || !std::all_of(params.begin(), params.end(), is_plain)) {
    return py::none();
  }
  std::vector<at::Tensor> tensors;
  tensors.reserve(params.size());
  for (const py::handle tensor : params) tensors.push_back(THPVariable_Unpack(tensor.ptr()));
  const auto input = x.is_none() ? std::nullopt : std::optional(THPVariable_Unpack(x.ptr()));
  std::optional<std::pair<at::Tensor, at::Tensor>> result;
  try {
    const py::gil_scoped_release release;
    result = program.run(THPVariable_Unpack(h.ptr()), input, std::move(tensors), THPVariable_Unpack(scalars.ptr()),
                         telemetry, direct);
  } catch (const c10::ValueError& error) {
    throw py::value_error(error.what_without_backtrace());
  }
  if (!result.has_value()) return py::none();
  return py::make_tuple(py::reinterpret_steal<py::object>(THPVariable_Wrap(result->first)),
                        py::reinterpret_steal<py::object>(THPVariable_Wrap(result->second)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("TORCH_VERSION") = esper::kTorchVersion;
  m.attr("TORCH_MARKER") = esper::kTorchMarker;
  m.attr("CUDA_ARCHS") = esper::kCudaArchs;
  m.attr("COMPILER") = esper::kCompiler;
  m.def("cpu_capability", [] { return std::string(esper::capability_name(esper::cpu_capability())); });

  py::list lifecycle;
  for (int id = 0; id < esper::kNumStates; ++id) {
    lifecycle.append(py::make_tuple(id, esper::kStateNames[static_cast<std::size_t>(id)]));
  }
  m.attr("LIFECYCLE") = py::tuple(lifecycle);
  m.def(
      "legal_move",
      [](std::int64_t from, std::int64_t to) {
        return esper::legal_move(checked_state(from, "from_state"), checked_state(to, "to_state"));
      },
      py::arg("from_state"), py::arg("to_state"));
  bind_seed_bank(m);
  py::class_<esper::SlotProgram>(m, "SlotProgram")
      .def(py::init<std::vector<std::int64_t>>(), py::arg("plan"))
      .def("run", &run_program, py::arg("h"), py::arg("x"), py::arg("params"), py::arg("scalars"),
           py::arg("telemetry") = false, py::arg("direct") = false)
      .def(
          "__deepcopy__", [](const esper::SlotProgram& p, const py::dict&) { return esper::SlotProgram(p); },
          py::arg("memo"));
  m.def("collect_parameters", &collect_parameters, py::arg("owners"));

  m.attr("STATS_COLUMNS") = py::tuple(py::cast(esper::kStatsColumns));
  m.attr("PLAN_FIELDS") = py::tuple(py::cast(esper::kPlanFields));
  m.def("release_memory", &esper::release_recycled);
  m.def("merge_stats", &merge_stats, py::arg("acc").noconvert(), py::arg("other").noconvert());
}
