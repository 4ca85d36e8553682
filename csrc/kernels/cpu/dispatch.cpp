#include "kernels/cpu/slot.h"
#include "kernels/cpu/spatial.h"

namespace esper::cpu {

#define ESPER_DECLARE(isa)                           \
  namespace isa {                                    \
  extern const SlotKernels<float> kFloatKernels;     \
  extern const SlotKernels<double> kDoubleKernels;   \
  extern const SpatialKernels<float> kFloatSpatial;  \
  extern const SpatialKernels<double> kDoubleSpatial; \
  }

ESPER_DECLARE(portable)
#if defined(__x86_64__)
ESPER_DECLARE(avx2)
ESPER_DECLARE(avx512)
#define ESPER_CHOOSE(table)                    \
  switch (cpu_capability()) {                  \
    case Capability::kAvx512:                  \
      return avx512::table;                    \
    case Capability::kAvx2:                    \
      return avx2::table;                      \
    default:                                   \
      return portable::table;                  \
  }
#else
#define ESPER_CHOOSE(table) return portable::table;
#endif

template <>
const SlotKernels<float>& slot_kernels<float>() {
  ESPER_CHOOSE(kFloatKernels)
}

template <>
const SlotKernels<double>& slot_kernels<double>() {
  ESPER_CHOOSE(kDoubleKernels)
}

template <>
const SpatialKernels<float>& spatial_kernels<float>() {
  ESPER_CHOOSE(kFloatSpatial)
}

template <>
const SpatialKernels<double>& spatial_kernels<double>() {
  ESPER_CHOOSE(kDoubleSpatial)
}

}  // namespace esper::cpu
