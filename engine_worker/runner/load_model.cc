#include "engine_worker/runner/load_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/model/ernie45.h"
#include "engine_worker/weights/checkpoint.h"
#include "kernels/cpu/cpu_backend.h"

namespace wintserve {
namespace {

KOrderChoice KOrderOf(const std::string& name) {
  if (name == "mma64") return KOrderChoice::kMma64;
  if (name == "natural") return KOrderChoice::kNatural;
  CHECK(name == "auto", "k_order={}", name);
  return KOrderChoice::kAuto;
}

}  // namespace

int CpuThreads(const ServeOptions& options) {
  if (options.cpu_threads > 0) return options.cpu_threads;
  const int num_cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, num_cores / options.tensor_parallel_size);
}

absl::StatusOr<LoadedModel> LoadModel(const ServeOptions& options, Collective* group) {
  if (options.device != "cpu") {
    return absl::UnavailableError(
        fmt::format("--device {}: this build has no backend for it, only for cpu", options.device));
  }
  const auto begin = std::chrono::steady_clock::now();
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model));
  RETURN_IF_ERROR(CheckTensorParallel(config, group->world_size()));
  ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint,
                   Checkpoint::Open(options.model, config, KOrderOf(options.k_order)));

  // Longer plans run as several passes.
  const int max_batch_tokens = std::min(options.max_num_batched_tokens, 512);
  LoadedModel loaded;
  loaded.backend = kernels::cpu::CreateCpuBackend(
      {.num_threads = CpuThreads(options), .max_rows = max_batch_tokens});
  const Ernie45Options model_options = {.max_batch_tokens = max_batch_tokens};
  ASSIGN_OR_RETURN(loaded.model,
                   LoadErnie45(config, *checkpoint, loaded.backend.get(),
                               group->world_size() == 1 ? nullptr : group, model_options));
  LOG_INFO("loaded {} in {:.1f} s: {} layers, {} MiB on disk, {}", options.model,
           std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(),
           config.num_layers, checkpoint->total_bytes() >> 20, loaded.backend->name());
  return loaded;
}

}  // namespace wintserve
