// ERNIE-4.5 text models: dense and mixture-of-experts decoders.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "engine_worker/collectives/collective.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/model/model.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/weight_source.h"
#include "kernels/backend.h"

namespace wintserve {

struct Ernie45Options {
  // Of one Forward call; memory is allocated for this many.
  int max_batch_tokens = 256;
  int max_logit_rows = 64;
  int num_load_threads = 1;  // that unpack weights, besides the backend's that pack them
};

// Takes every weight of this rank from `source`, which may go afterwards.
// collective: null for a single rank; else `source` is of its rank. It and the backend outlive the
// model.
// Errors: INVALID_ARGUMENT for shapes that the backend does not have or that do not split over
// world_size ranks, before anything is loaded; RESOURCE_EXHAUSTED when weights and activations do
// not fit the device's memory; and whatever else the source or the backend reports, with the
// tensor's place in front.
absl::StatusOr<std::unique_ptr<Model>> LoadErnie45(const ModelConfig& config, WeightSource* source,
                                                   kernels::Backend* backend,
                                                   Collective* collective,
                                                   const Ernie45Options& options);

// The same from a checkpoint, which may go as well.
absl::StatusOr<std::unique_ptr<Model>> LoadErnie45(const ModelConfig& config,
                                                   const Checkpoint& checkpoint,
                                                   kernels::Backend* backend,
                                                   Collective* collective,
                                                   const Ernie45Options& options);

}  // namespace wintserve
