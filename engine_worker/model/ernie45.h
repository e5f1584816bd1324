// ERNIE-4.5 text models: dense and mixture-of-experts decoders.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "engine_worker/collectives/collective.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/model/model.h"
#include "engine_worker/weights/checkpoint.h"
#include "kernels/backend.h"

namespace wintserve {

struct Ernie45Options {
  // Of one Forward call; memory is allocated for this many.
  int max_batch_tokens = 256;
  int max_logit_rows = 64;
  int num_load_threads = 1;  // that unpack weights, besides the backend's that pack them
};

// Loads this rank's slice of every weight, one tensor after the other, into the backend's layout.
// Besides what is packed, the tensor that is being packed and a few after it (at most one for each
// load thread, MatrixReader) are in host memory.
// collective: null for a single rank. It and the backend outlive the model; the checkpoint may go.
// Errors: INVALID_ARGUMENT for shapes that the model cannot run over world_size ranks,
// RESOURCE_EXHAUSTED when weights and activations do not fit the device's memory, and whatever else
// the checkpoint or the backend reports, with the tensor's place in front.
absl::StatusOr<std::unique_ptr<Model>> LoadErnie45(const ModelConfig& config,
                                                   const Checkpoint& checkpoint,
                                                   kernels::Backend* backend,
                                                   Collective* collective,
                                                   const Ernie45Options& options);

}  // namespace wintserve
