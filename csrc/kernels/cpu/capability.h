// Which instruction set the CPU kernels use.
#pragma once

namespace esper {

enum class Capability { kPortable, kAvx2, kAvx512 };

const char* capability_name(Capability capability);

// The best one that this CPU has, or the one that ESPER_CPU_CAPABILITY (avx512, avx2 or portable) names.
// Decided once. Throws std::invalid_argument for an unknown name or one that this CPU lacks.
Capability cpu_capability();

}  // namespace esper
