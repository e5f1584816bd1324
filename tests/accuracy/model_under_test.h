// A checkpoint on one device, run over given token ids: logits of every position, and greedy text.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/mapped_memory.h"
#include "common/mutex.h"
#include "engine_worker/collectives/rank_group.h"
#include "engine_worker/collectives/shm/shm_collective.h"
#include "engine_worker/model/model.h"
#include "kernels/backend.h"

namespace wintserve::accuracy {

using TokenIds = std::vector<int32_t>;

// Where the ranks of a tensor-parallel group, threads of one process, meet.
class MeetingPlace {
 public:
  explicit MeetingPlace(int world_size);
  int world_size() const { return world_size_; }
  // For operations on the device: `slot_bytes` as the collective of that device wants it.
  std::shared_ptr<MappedMemory> group_memory(int64_t slot_bytes);
  const std::shared_ptr<MappedMemory>& host_memory() const { return host_memory_; }

 private:
  const int world_size_;
  Mutex mutex_;
  std::shared_ptr<MappedMemory> group_memory_ GUARDED_BY(mutex_);
  const std::shared_ptr<MappedMemory> host_memory_;
};

struct ModelUnderTestOptions {
  std::string model_dir;
  std::string device = "cpu";  // cpu | cuda
  // Of the CPU. A GPU does not round weights.
  kernels::WeightRounding rounding = kernels::WeightRounding::kUnrounded;
  int num_threads = 1;                                    // of the CPU
  int rank = 0;                                           // on a GPU of this number
  std::shared_ptr<MeetingPlace> meeting_place = nullptr;  // null: one rank
};

struct GreedyRequest {
  TokenIds prompt;
  int max_tokens = 0;
};

// With several ranks each has one of these on a thread of its own, and all are asked the same; only
// rank 0 has logits to hand out.
// Threading: one thread.
class ModelUnderTest {
 public:
  // Through the loader of the engine worker; waits for the other ranks. UNAVAILABLE: this build or
  // machine has no such device.
  static absl::StatusOr<std::unique_ptr<ModelUnderTest>> Load(const ModelUnderTestOptions& options);

  // Called with the logits [vocab_size] of each position of each sequence.
  using LogitSink =
      std::function<void(size_t sequence, size_t position, std::span<const float> logits)>;

  // Runs every sequence token by token, many sequences to a batch, as in decoding; then each as
  // whole prompts in chunks, on a pool that held nothing. Returns for how many sequences the last
  // position had the same bits both ways (0 on other ranks than 0).
  absl::StatusOr<int> TeacherForce(const std::vector<TokenIds>& sequences, const LogitSink& sink);

  // Greedy continuations, all prompts in one batch, through the step runner. The stop id ends one
  // and is its last.
  absl::StatusOr<std::vector<TokenIds>> Greedy(const std::vector<GreedyRequest>& requests,
                                               int32_t stop_id);

  ~ModelUnderTest() { group_.Unbind(); }  // before the device that it works on

  int vocab_size() const { return model_->vocab_size(); }
  std::string backend_name() const { return backend_->name(); }

 private:
  ModelUnderTest(int rank, int world_size) : group_(rank, world_size) {}
  absl::Status Join(MeetingPlace* meeting_place);
  absl::StatusOr<std::unique_ptr<kernels::Buffer>> MakePool(int64_t num_blocks);
  absl::StatusOr<std::vector<float>> Forward(const kernels::Batch& batch,
                                             kernels::DeviceBatch* device_batch, void* pool);

  std::unique_ptr<kernels::Backend> backend_;
  RankGroup group_;
  std::unique_ptr<ShmCollective> host_group_;  // through which ranks learn what rank 0 sampled
  std::unique_ptr<Model> model_;
};

}  // namespace wintserve::accuracy
