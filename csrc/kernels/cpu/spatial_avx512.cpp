#if defined(__x86_64__)
#include "kernels/cpu/spatial.h"

// Only what follows is compiled for this instruction set: code of the headers above is shared with
// other files, and the linker may keep either copy.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")

#define ESPER_ISA avx512
#define ESPER_VECTOR_BYTES 64
#define ESPER_VECTOR_REGISTERS 32
#include "kernels/cpu/spatial_kernels.inc"
#endif
