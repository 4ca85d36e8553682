#include "kernels/cpu/growth.h"

#include "kernels/cpu/capability.h"

#define ESPER_ISA portable
#include "kernels/cpu/growth_kernels.inc"
#undef ESPER_ISA

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define ESPER_ISA avx2
#include "kernels/cpu/growth_kernels.inc"
#undef ESPER_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma")
#define ESPER_ISA avx512
#include "kernels/cpu/growth_kernels.inc"
#undef ESPER_ISA
#pragma GCC pop_options
#endif

namespace esper::cpu {

const GrowthKernels& growth_kernels() {
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::kAvx512:
      return avx512::kGrowthKernels;
    case Capability::kAvx2:
      return avx2::kGrowthKernels;
    default:
      break;
  }
#endif
  return portable::kGrowthKernels;
}

}  // namespace esper::cpu
