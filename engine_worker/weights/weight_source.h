// Where a model's weights come from: a checkpoint, or nowhere (dummy_source.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/weights/checkpoint.h"
#include "kernels/backend.h"

namespace wintserve {

// One rank's weights on one backend. Threading: one thread.
class WeightSource {
 public:
  virtual ~WeightSource() = default;

  // The matrices of AllMatrices(config) in that order, in the backend's layout.
  // REQUIRES: `ref` is the next one.
  virtual absl::StatusOr<std::unique_ptr<kernels::WeightMatrix>> NextMatrix(
      const MatrixRef& ref) = 0;
  // How much of the work of loading `ref` is: about the bytes of the files that NextMatrix reads,
  // or those that it fills where there are none.
  virtual int64_t BytesOf(const MatrixRef& ref) const = 0;
  // As Checkpoint::LoadVector.
  virtual absl::StatusOr<std::vector<float>> LoadVector(VectorRole role, int layer) const = 0;
  virtual bool has_router_bias() const = 0;
  // Differs where the weights of the whole model differ, or how they are decoded.
  virtual std::string identity() const = 0;
};

kernels::MatrixUse UseOf(MatrixRole role);

// Unpacks on num_threads threads, while the backend packs: besides what is packed, the tensor that
// is being packed and a few after it are in host memory (MatrixReader). The checkpoint and the
// backend outlive the source.
std::unique_ptr<WeightSource> MakeCheckpointSource(const ModelConfig& config,
                                                   const Checkpoint& checkpoint,
                                                   kernels::Backend* backend, int rank,
                                                   int world_size, int num_threads);

}  // namespace wintserve
