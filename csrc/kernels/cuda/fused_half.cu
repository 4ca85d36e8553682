#include "kernels/cuda/fused.cuh"

namespace esper::cuda {

template const char* forward_of<Half>(const FusedCall&, void*);
template const char* backward_of<Half>(const FusedCall&, void*);

}  // namespace esper::cuda
