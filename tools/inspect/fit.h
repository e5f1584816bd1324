// Whether a model fits a given memory, and how much of a KV cache beside it: arithmetic, so that it
// can be asked without the machine.
#pragma once

#include <cstdint>

#include "engine_worker/config/model_config.h"
#include "kernels/plan/kv_layout.h"
#include "tools/inspect/sizes.h"

namespace wintserve::inspect {

struct FitOptions {
  double memory_gib = 0;  // of each GPU, or of the host, which all ranks of a CPU share
  bool on_cpu = false;
  double utilization = 0.92;  // of a GPU's memory; as `wintserve serve --gpu-memory-utilization`
  int world_size = 1;
  int max_model_len = 2048;
  kernels::plan::KvCacheKind kv_cache = kernels::plan::KvCacheKind::kBfloat16;  // of a GPU
};

// In bytes: of one GPU, or of the host with all its ranks.
struct Fit {
  int64_t allowed = 0;  // of the memory
  int64_t weights = 0;
  int64_t activations = 0;  // of the largest step that serve makes by default, an estimate
  int64_t kv_bytes = 0;     // what is left, 0 if nothing is
  int64_t kv_bytes_per_token = 0;
  int64_t kv_tokens = 0;        // whole blocks
  bool fits = false;            // one sequence of max_model_len does
  int smallest_fitting_tp = 0;  // of 1, 2, 4 and 8 where `fits` is false; 0: none of them
};

// REQUIRES: CheckTensorParallel(config, options.world_size) is OK.
Fit FitModel(const ModelConfig& config, const CheckpointFiles* files, const FitOptions& options);

}  // namespace wintserve::inspect
