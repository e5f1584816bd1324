// A step that the device works on.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "common/mutex.h"
#include "engine_worker/collectives/collective.h"
#include "kernels/backend.h"

namespace wintserve {

// How at most max_rows ids and what is asked of their log-probabilities lie in one piece of memory,
// on the device as on the host: the results of a step's sampled rows; or ids of a prompt, which the
// host brings.
class StepResultLayout {
 public:
  explicit StepResultLayout(int64_t max_rows) : max_rows_(max_rows) {}

  int64_t size_bytes() const { return max_rows_ * kWordsPerRow * kWordBytes; }
  static int64_t ids_bytes(int64_t num_rows) { return num_rows * kWordBytes; }
  int32_t* ids(void* memory) const { return static_cast<int32_t*>(memory); }
  kernels::LogprobArrays logprobs(void* memory) const;

 private:
  static constexpr int64_t kWordBytes = 4;
  // An id, its log-probability and rank, ids and log-probabilities of the top.
  static constexpr int64_t kWordsPerRow = 3 + 2 * kernels::sampling::kMaxTopLogprobs;

  int64_t max_rows_;
};

// Host memory for the results of steps, lent to one step at a time.
// Threading: thread-safe.
class ResultBuffers {
 public:
  // REQUIRES: the backend outlives the pool and all that it has lent.
  ResultBuffers(kernels::Backend* backend, const StepResultLayout& layout)
      : backend_(backend), size_bytes_(layout.size_bytes()) {}

  // One that was given back, or a new one. RESOURCE_EXHAUSTED: no memory. Calls the backend, so it
  // is for the thread that may.
  absl::StatusOr<std::unique_ptr<kernels::Buffer>> Take() EXCLUDES(mutex_);
  void GiveBack(std::unique_ptr<kernels::Buffer> buffer) EXCLUDES(mutex_);

 private:
  kernels::Backend* const backend_;
  const int64_t size_bytes_;
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
    uint32_t position = 0;          // of the sampled token
    int32_t num_top_logprobs = -1;  // -1: no log-probability either
  };
  // Tokens of one slot's prompt, at consecutive positions.
  struct PromptPiece {
    uint32_t slot = 0;
    uint32_t position = 0;
    int32_t num_tokens = 0;
    int32_t num_top_logprobs = 0;
    std::unique_ptr<kernels::Buffer> results = nullptr;  // of prompt_layout, complete after `end`
  };
  struct Work {
    StepDone done;  // without what the device decides
    std::vector<Sampled> sampled = {};
    bool reports_ids = false;  // rank 0
    int32_t sampled_vocab_size = 0;
    std::unique_ptr<kernels::Event> begin = nullptr;
    std::unique_ptr<kernels::Event> end = nullptr;
    std::unique_ptr<kernels::Event> copies = nullptr;  // beside the rest; null: none
    StepResultLayout layout{0};
    std::unique_ptr<kernels::Buffer> results = nullptr;  // of `layout`, complete after `end`
    Collective* collective = nullptr;                    // null: the step needs none
    StepResultLayout prompt_layout{0};
    std::vector<PromptPiece> prompt_pieces = {};  // in row order, and within a row; of rank 0
    std::shared_ptr<ResultBuffers> prompt_buffers = nullptr;  // of their results
  };

  PendingStep(Work work, std::shared_ptr<ResultBuffers> result_buffers);

  // Whether Wait() would return at once. Any thread.
  bool IsDone() const {
    return work_.end->IsDone() && (work_.copies == nullptr || work_.copies->IsDone());
  }
  // Device time from the end of `previous` to the begin of this step. REQUIRES: Wait() of both was
  // OK.
  int64_t MicrosecondsAfter(const PendingStep& previous) const {
    return work_.begin->MicrosecondsSince(*previous.work_.end);
  }
  // UNAVAILABLE: the group was aborted meanwhile. INTERNAL: the device failed, the logits of a row
  // were not finite, or an id is none.
  absl::StatusOr<StepDone> Wait();

 private:
  absl::Status CheckId(const Sampled& row, int32_t id) const;
  absl::Status TakePromptPiece(PromptPiece piece, std::vector<PromptRowLogprobs>* rows);
  // Of the i-th sampled row; absent: it does not ask.
  std::optional<PositionLogprobs> LogprobsOf(int64_t i) const;

  Work work_;
  std::shared_ptr<ResultBuffers> result_buffers_;
};

}  // namespace wintserve
