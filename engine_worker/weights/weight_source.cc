#include "engine_worker/weights/weight_source.h"

#include <fmt/format.h>

#include "common/check.h"
#include "common/status_macros.h"
#include "engine_worker/weights/matrix_reader.h"

namespace wintserve {
namespace {

class CheckpointSource final : public WeightSource {
 public:
  CheckpointSource(const ModelConfig& config, const Checkpoint& checkpoint,
                   kernels::Backend* backend, int rank, int world_size, int num_threads)
      : checkpoint_(checkpoint),
        backend_(backend),
        rank_(rank),
        world_size_(world_size),
        matrices_(checkpoint, AllMatrices(config), rank, world_size, num_threads) {}

  absl::StatusOr<std::unique_ptr<kernels::WeightMatrix>> NextMatrix(const MatrixRef& ref) override {
    ASSIGN_OR_RETURN(const formats::HostMatrix host, matrices_.Next(ref));
    return backend_->Pack(host, UseOf(ref.role));
  }
  int64_t BytesOf(const MatrixRef& ref) const override {
    return checkpoint_.BytesOf(ref, rank_, world_size_).on_disk;
  }
  absl::StatusOr<std::vector<float>> LoadVector(VectorRole role, int layer) const override {
    return checkpoint_.LoadVector(role, layer);
  }
  bool has_router_bias() const override { return checkpoint_.has_router_bias(); }
  std::string identity() const override {
    return fmt::format("checkpoint={:016x} k_order={} unrounded={}", checkpoint_.digest(),
                       static_cast<int>(checkpoint_.k_order()),
                       backend_->rounding() == kernels::WeightRounding::kUnrounded);
  }

 private:
  const Checkpoint& checkpoint_;
  kernels::Backend* const backend_;
  const int rank_;
  const int world_size_;
  MatrixReader matrices_;
};

}  // namespace

kernels::MatrixUse UseOf(MatrixRole role) {
  switch (role) {
    case MatrixRole::kEmbedding:
      return kernels::MatrixUse::kEmbedding;
    case MatrixRole::kGateUp:
      return kernels::MatrixUse::kGateUp;
    case MatrixRole::kRouter:
      return kernels::MatrixUse::kRouter;
    case MatrixRole::kHead:
    case MatrixRole::kQkv:
    case MatrixRole::kOutput:
    case MatrixRole::kDown:
      return kernels::MatrixUse::kLinear;
  }
  CHECK(false, "role={}", static_cast<int>(role));
}

std::unique_ptr<WeightSource> MakeCheckpointSource(const ModelConfig& config,
                                                   const Checkpoint& checkpoint,
                                                   kernels::Backend* backend, int rank,
                                                   int world_size, int num_threads) {
  return std::make_unique<CheckpointSource>(config, checkpoint, backend, rank, world_size,
                                            num_threads);
}

}  // namespace wintserve
