#if defined(__x86_64__)
#include "kernels/cpu/spatial.h"

// Only what follows is compiled for this instruction set: code of the headers above is shared with
// other files, and the linker may keep either copy.
#pragma GCC target("avx2,fma")

#define ESPER_ISA avx2
#define ESPER_VECTOR_BYTES 32
#define ESPER_VECTOR_REGISTERS 16
#include "kernels/cpu/spatial_kernels.inc"
#endif
