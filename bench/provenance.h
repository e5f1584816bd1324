// Where and when a result was measured.
#pragma once

#include <string>

namespace wintserve::bench {

// Of this machine: "AMD EPYC 9B14, 2 cores, AVX3": CPU, cores that this process may use, the SIMD
// target of the kernels.
std::string DeviceDescription();

// "2026-01-31", UTC.
std::string Today();

}  // namespace wintserve::bench
