// From a model's directory to a model that runs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "common/config/serve_options.h"
#include "engine_worker/collectives/rank_group.h"
#include "engine_worker/model/model.h"
#include "kernels/backend.h"

namespace wintserve {

struct LoadedModel {
  std::unique_ptr<kernels::Backend> backend;  // outlives the model
  std::unique_ptr<Model> model;
  // What is left for KV blocks: of the share of the device's memory that --gpu-memory-utilization
  // allows, or of all of it where --num-gpu-blocks-override replaces that rule; on a CPU the memory
  // of the host, which its ranks share.
  int64_t kv_bytes_available = 0;
};

// What is told while a model is loaded, on the thread that loads. Must not block.
struct LoadEvents {
  // After each tensor that is loaded and each further stage.
  std::function<void()> on_progress = [] {};
  // How much of the rank's part of the files has been loaded, or of dummy weights has been filled:
  // none of it at first, then after each matrix, all of it in the end.
  std::function<void(int64_t done_bytes, int64_t total_bytes)> on_bytes = [](int64_t, int64_t) {};
};

// Threads of one worker: options.cpu_threads, or its share of the cores that this process may use.
int CpuThreads(const ServeOptions& options);

// Loads the slice of group->rank(), on the device of that number among those that the process sees.
// The group is used by forward passes only, outlives the model and is bound to nothing.
// UNAVAILABLE: this build or this machine has no such device, or not what several of them need.
// RESOURCE_EXHAUSTED: the model and the KV cache of one sequence do not fit its memory; if the
// config alone tells, before anything is loaded. Any other error: the checkpoint; it names the file
// and the tensor or key.
//
// is_replacement: the KV pool of the process before may be on the device already, in which case
// next to nothing is left for another, and that is no error.
absl::StatusOr<LoadedModel> LoadModel(const ServeOptions& options, RankGroup* group,
                                      bool is_replacement = false, const LoadEvents& events = {});

}  // namespace wintserve
