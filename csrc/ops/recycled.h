// Memory of large results, given out again when they are freed.
#pragma once

#include <ATen/core/Tensor.h>

namespace esper {

// A contiguous tensor on the CPU, not initialised. The heap gives large blocks back to the system, so that
// every call would pay for fresh pages again; here some are kept, in pages of 2 MB where the system has them.
at::Tensor recycled_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives the memory that is kept back to the system.
void release_recycled();

}  // namespace esper
