#include "kernels/cpu/spatial.h"

#define ESPER_ISA portable
#define ESPER_VECTOR_BYTES 16
#define ESPER_VECTOR_REGISTERS 16
#include "kernels/cpu/spatial_kernels.inc"
