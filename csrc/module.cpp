// The Python face of esper._C: build facts. Importing it also registers the torch operators of csrc/ops.
#include <pybind11/pybind11.h>

#include "build_facts.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.attr("TORCH_VERSION") = esper::kTorchVersion;
  m.attr("TORCH_MARKER") = esper::kTorchMarker;
  m.attr("CUDA_ARCHS") = esper::kCudaArchs;
  m.attr("COMPILER") = esper::kCompiler;
}
