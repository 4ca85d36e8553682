#include "kernels/cuda/fused.cuh"

namespace esper::cuda {

template const char* forward_of<BFloat16>(const FusedCall&, void*);
template const char* backward_of<BFloat16>(const FusedCall&, void*);

}  // namespace esper::cuda
