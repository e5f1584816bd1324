// The CPU twin of kernels::Backend. Device memory is host memory.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace wintserve::kernels::cpu {

struct CpuBackendOptions {
  int num_threads = 1;  // including the calling thread; >= 1
  WeightRounding rounding = WeightRounding::kFastDeploy;
  // Of the largest batch to come: the first batch, however small, takes the working memory for it.
  // 0: the memory grows to the largest batch seen.
  int64_t max_rows = 0;
};

std::unique_ptr<Backend> CreateCpuBackend(const CpuBackendOptions& options);

}  // namespace wintserve::kernels::cpu
