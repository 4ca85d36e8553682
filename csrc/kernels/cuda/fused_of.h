// The fused kernels by element. Each is compiled in a file of its own, as compilers take long over them.
#pragma once

#include "kernels/cuda/fused.h"
#include "kernels/cuda/mma.h"

namespace esper::cuda {

template <class E>
const char* forward_of(const FusedCall& call, void* stream);
template <class E>
const char* backward_of(const FusedCall& call, void* stream);

}  // namespace esper::cuda
