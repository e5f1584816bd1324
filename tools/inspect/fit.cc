#include "tools/inspect/fit.h"

#include <algorithm>

#include "common/config/serve_options.h"
#include "kernels/batch.h"

namespace wintserve::inspect {
namespace {

// Rows of float32 between the operators of the largest step, as the model allocates them, and for
// the operators themselves the least that a worker asks for before it measures.
int64_t Activations(const ModelConfig& config, const FitOptions& options) {
  constexpr int64_t kLeastScratchBytes = int64_t{256} << 20;
  const ServeOptions defaults;
  const int64_t max_tokens =
      options.on_cpu ? defaults.max_num_batched_tokens : kGpuMaxNumBatchedTokens;
  const int64_t max_seqs = options.on_cpu ? defaults.max_num_seqs : kGpuMaxNumSeqs;
  const int64_t ranks = options.world_size;
  const int64_t heads = config.num_heads / ranks;
  const int64_t kv_heads = std::max<int64_t>(1, config.num_kv_heads / ranks);
  const int64_t row = int64_t{3} * config.hidden_size + (heads + 2 * kv_heads) * config.head_dim +
                      heads * config.head_dim + config.head_dim;
  const int64_t logits = max_seqs * config.vocab_size;
  const int64_t workspace = 4 * (max_tokens * row + logits / ranks + (ranks > 1 ? 2 * logits : 0));
  return workspace + (options.on_cpu ? 0 : workspace / 2 + kLeastScratchBytes);
}

Fit FitOnce(const ModelConfig& config, const CheckpointFiles* files, const FitOptions& options) {
  const ModelSizes sizes = SizesOf(config, files, 0, options.world_size);
  const int64_t ranks_here = options.on_cpu ? options.world_size : 1;
  Fit fit;
  fit.allowed = static_cast<int64_t>(options.memory_gib * (int64_t{1} << 30) *
                                     (options.on_cpu ? 1 : options.utilization));
  fit.weights = ranks_here * (options.on_cpu ? sizes.total().on_cpu : sizes.total().on_cuda);
  fit.activations = ranks_here * Activations(config, options);
  fit.kv_bytes_per_token =
      ranks_here * (options.on_cpu
                        ? CpuKvBytesPerToken(config, options.world_size)
                        : CudaKvBytesPerToken(config, options.world_size, options.kv_cache));
  fit.kv_bytes = std::max<int64_t>(0, fit.allowed - fit.weights - fit.activations);
  constexpr int64_t kBlock = kernels::kKvBlockTokens;
  fit.kv_tokens = fit.kv_bytes / (fit.kv_bytes_per_token * kBlock) * kBlock;
  fit.fits = fit.kv_tokens >= (options.max_model_len + kBlock - 1) / kBlock * kBlock;
  return fit;
}

}  // namespace

Fit FitModel(const ModelConfig& config, const CheckpointFiles* files, const FitOptions& options) {
  Fit fit = FitOnce(config, files, options);
  const bool may_split = !options.on_cpu && (files == nullptr || !files->is_presharded());
  if (fit.fits || !may_split) return fit;
  for (const int world_size : {1, 2, 4, 8}) {
    if (!CheckTensorParallel(config, world_size).ok()) continue;
    FitOptions other = options;
    other.world_size = world_size;
    if (!FitOnce(config, files, other).fits) continue;
    fit.smallest_fitting_tp = world_size;
    break;
  }
  return fit;
}

}  // namespace wintserve::inspect
