// What this build was made from. The marker is a plain string in the read-only data of the library, so
// that it can be read from the file before the library is loaded: a library built against another torch
// may crash while loading.
#pragma once

namespace esper {

inline constexpr char kTorchMarker[] = "esper-built-against-torch=" ESPER_TORCH_VERSION ";";
inline constexpr char kTorchVersion[] = ESPER_TORCH_VERSION;
inline constexpr char kCudaArchs[] = ESPER_CUDA_ARCHS;  // "" without CUDA, else such as "80,90"
#if defined(__clang__)
inline constexpr char kCompiler[] = "clang " __VERSION__;
#else
inline constexpr char kCompiler[] = "gcc " __VERSION__;
#endif

}  // namespace esper
