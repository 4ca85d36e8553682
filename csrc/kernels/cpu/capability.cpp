#include "kernels/cpu/capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace esper {
namespace {

bool supported(Capability capability) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (capability) {
    case Capability::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("fma");
    case Capability::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default:
      return true;
  }
#else
  return capability == Capability::kPortable;
#endif
}

Capability choose() {
  constexpr Capability kBestFirst[] = {Capability::kAvx512, Capability::kAvx2, Capability::kPortable};
  const char* wish = std::getenv("ESPER_CPU_CAPABILITY");
  if (wish == nullptr || *wish == '\0') {
    for (const Capability capability : kBestFirst) {
      if (supported(capability)) return capability;
    }
  }
  for (const Capability capability : kBestFirst) {
    if (std::string(wish) != capability_name(capability)) continue;
    if (supported(capability)) return capability;
    throw std::invalid_argument("ESPER_CPU_CAPABILITY is '" + std::string(wish) +
                                "' but this CPU does not support it");
  }
  throw std::invalid_argument("ESPER_CPU_CAPABILITY is '" + std::string(wish) +
                              "' but must be avx512, avx2 or portable");
}

}  // namespace

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace esper
