#include "engine_worker/collectives/single_rank_collective.h"

#include <algorithm>

namespace wintserve {
namespace {

class SingleRankCollective : public Collective {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }

  absl::Status AllReduceSum(float* /*data*/, int64_t /*count*/) override {
    return absl::OkStatus();
  }
  absl::Status AllGather(const float* in, int64_t count, float* out) override {
    std::copy_n(in, count, out);
    return absl::OkStatus();
  }
  absl::Status Broadcast(void* /*data*/, int64_t /*size_bytes*/) override {
    return absl::OkStatus();
  }
};

}  // namespace

std::unique_ptr<Collective> MakeSingleRankCollective() {
  return std::make_unique<SingleRankCollective>();
}

}  // namespace wintserve
