// From a checkpoint directory to a model that runs.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "common/config/serve_options.h"
#include "engine_worker/collectives/collective.h"
#include "engine_worker/model/model.h"
#include "kernels/backend.h"

namespace wintserve {

struct LoadedModel {
  std::unique_ptr<kernels::Backend> backend;  // outlives the model
  std::unique_ptr<Model> model;
};

// Threads of one worker: options.cpu_threads, or its share of the cores that this process may use.
int CpuThreads(const ServeOptions& options);

// Loads the slice of group->rank(). The group is used by forward passes only, and outlives the
// model. UNAVAILABLE: this build has no such device. Any other error: the checkpoint; it names the
// file and the tensor or key.
absl::StatusOr<LoadedModel> LoadModel(const ServeOptions& options, Collective* group);

}  // namespace wintserve
