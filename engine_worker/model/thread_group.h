// Tensor-parallel ranks as threads of one test process.
#pragma once

#include <barrier>
#include <cstring>
#include <memory>
#include <vector>

#include "engine_worker/collectives/collective.h"

namespace wintserve {

// Owns what the ranks of one group share.
class ThreadGroup {
 public:
  explicit ThreadGroup(int world_size) : barrier_(world_size), inputs_(world_size) {
    for (int rank = 0; rank < world_size; ++rank) {
      members_.push_back(std::make_unique<Member>(this, rank));
    }
  }
  Collective* rank(int rank) { return members_[rank].get(); }

 private:
  class Member final : public Collective {
   public:
    Member(ThreadGroup* group, int rank) : group_(group), rank_(rank) {}
    int rank() const override { return rank_; }
    int world_size() const override { return static_cast<int>(group_->inputs_.size()); }

    absl::Status AllReduceSum(float* data, int64_t count) override {
      std::vector<float> sum(count, 0.0f);
      Exchange(data, [&](const std::vector<const void*>& inputs) {
        for (const void* input : inputs) {
          for (int64_t i = 0; i < count; ++i) sum[i] += static_cast<const float*>(input)[i];
        }
      });
      std::memcpy(data, sum.data(), count * sizeof(float));
      return absl::OkStatus();
    }

    absl::Status AllGather(const float* in, int64_t count, float* out) override {
      Exchange(in, [&](const std::vector<const void*>& inputs) {
        for (size_t r = 0; r < inputs.size(); ++r) {
          std::memcpy(out + r * count, inputs[r], count * sizeof(float));
        }
      });
      return absl::OkStatus();
    }

    absl::Status Broadcast(void* data, int64_t size_bytes) override {
      Exchange(data, [&](const std::vector<const void*>& inputs) {
        if (rank_ != 0) std::memcpy(data, inputs[0], size_bytes);
      });
      return absl::OkStatus();
    }

   private:
    // Calls read(inputs of all ranks) between two barriers.
    template <typename Read>
    void Exchange(const void* input, const Read& read) {
      group_->inputs_[rank_] = input;
      group_->barrier_.arrive_and_wait();
      read(group_->inputs_);
      group_->barrier_.arrive_and_wait();
    }

    ThreadGroup* const group_;
    const int rank_;
  };

  std::barrier<> barrier_;
  std::vector<const void*> inputs_;
  std::vector<std::unique_ptr<Member>> members_;
};

}  // namespace wintserve
