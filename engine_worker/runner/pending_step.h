// A step that the device works on.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "common/mutex.h"
#include "kernels/backend.h"

namespace wintserve {

// Host memory for the ids that steps sample, lent to one step at a time.
// Threading: thread-safe.
class IdBuffers {
 public:
  // Room for max_ids in each. REQUIRES: the backend outlives the pool and all that it has lent.
  IdBuffers(kernels::Backend* backend, int64_t max_ids) : backend_(backend), max_ids_(max_ids) {}

  // One that was given back, or a new one. RESOURCE_EXHAUSTED: no memory. Calls the backend, so it
  // is for the thread that may.
  absl::StatusOr<std::unique_ptr<kernels::Buffer>> Take() EXCLUDES(mutex_);
  void GiveBack(std::unique_ptr<kernels::Buffer> buffer) EXCLUDES(mutex_);

 private:
  kernels::Backend* const backend_;
  const int64_t max_ids_;
  Mutex mutex_;
  std::vector<std::unique_ptr<kernels::Buffer>> free_ GUARDED_BY(mutex_);
};

// What is left of a step once its operators have been called: the result, and what is to be waited
// for. Threading: Wait() on any thread, once.
class PendingStep {
 public:
  // One row whose next token is sampled.
  struct Sampled {
    uint32_t slot = 0;
    uint32_t position = 0;  // of the sampled token
  };
  struct Work {
    StepDone done;  // without what the device decides
    std::vector<Sampled> sampled = {};
    bool reports_ids = false;  // rank 0
    int32_t sampled_vocab_size = 0;
    std::unique_ptr<kernels::Event> begin = nullptr;
    std::unique_ptr<kernels::Event> end = nullptr;
    std::unique_ptr<kernels::Buffer> ids = nullptr;  // int32 [sampled.size()], complete after `end`
  };

  PendingStep(Work work, std::shared_ptr<IdBuffers> id_buffers);

  // Whether Wait() would return at once. Any thread.
  bool IsDone() const { return work_.end->IsDone(); }
  // INTERNAL: the device failed, the logits of a row were not finite, or an id is none.
  absl::StatusOr<StepDone> Wait();

 private:
  absl::Status CheckId(const Sampled& row, int32_t id) const;

  Work work_;
  std::shared_ptr<IdBuffers> id_buffers_;
};

}  // namespace wintserve
