// The C functions through which emulator.py launches a kernel. Included after the kernel.
#pragma once

#include "simt.h"

namespace simt {

// Runs a launch; what goes wrong becomes a text and a status that is not 0.
inline int guarded_run(const Launch& launch, const Options& options,
                       const std::function<void()>& body, Statistics* statistics, char* error,
                       size_t error_bytes) {
  try {
    *statistics = run(launch, options, body);
    return 0;
  } catch (const std::exception& exception) {
    snprintf(error, error_bytes, "%s", exception.what());
    current_machine() = nullptr;
    return 1;
  }
}

}  // namespace simt

// Makes simt_launch_<kernel>, which runs a kernel of one parameter with the given shape.
#define SIMT_LAUNCHER(kernel, ParametersType, THREADS, SHARED_BYTES, CLUSTER, COOPERATIVE)        \
  extern "C" int simt_launch_##kernel(unsigned blocks, const void* parameters,                    \
                                      const simt::Range* ranges, size_t range_count,              \
                                      const simt::Options* options, simt::Statistics* statistics, \
                                      char* error, size_t error_bytes) {                          \
    const simt::Launch launch{blocks,  THREADS,     (unsigned)(CLUSTER),                          \
                              SHARED_BYTES, COOPERATIVE, {ranges, ranges + range_count}};         \
    const ParametersType copy = *(const ParametersType*)parameters;                               \
    return simt::guarded_run(                                                                     \
        launch, *options, [&] { kernel(copy); }, statistics, error, error_bytes);                 \
  }
