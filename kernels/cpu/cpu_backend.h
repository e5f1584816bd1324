// The CPU twin of kernels::Backend. Device memory is host memory.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace wintserve::kernels::cpu {

struct CpuBackendOptions {
  int num_threads = 1;  // including the calling thread; >= 1
  WeightRounding rounding = WeightRounding::kFastDeploy;
};

std::unique_ptr<Backend> CreateCpuBackend(const CpuBackendOptions& options);

}  // namespace wintserve::kernels::cpu
