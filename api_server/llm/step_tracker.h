// The plans that the workers have been sent, until every rank has done them.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api_server/llm/step_deadline.h"
#include "api_server/scheduler/plan.h"

namespace wintserve {

struct FinishedStep {
  uint64_t step = 0;
  std::vector<SampledToken> sampled;  // of rank 0, as is the next
  std::vector<PromptRowLogprobs> prompt_logprobs = {};
  int num_sequences = 0;
  int num_tokens = 0;
  StepShape shape = {};
  uint32_t execute_us = 0;  // of the slowest rank
  int64_t latency_us = 0;   // from sending the plan until every rank had done it
  int64_t running_us = 0;   // of that, the time after the step before it was done
};

// The oldest plan in flight.
struct RunningStep {
  uint64_t step = 0;
  StepShape shape = {};
  int64_t began_us = 0;       // sent, and the one before it done
  uint32_t missing_rank = 0;  // the first that has not done it
};

// Of one rank group. Steps finish in order: one that a fast rank has done waits for the slow ones,
// and for the steps before it.
// Threading: thread-compatible. Time: microseconds of any clock that does not go back.
class StepTracker {
 public:
  StepTracker(uint32_t world_size, uint64_t group_epoch)
      : group_epoch_(group_epoch), num_done_(world_size) {}

  // The plan went out to every rank as `plan_hash`. REQUIRES: plan.step is the last one's + 1; the
  // first one's may be any.
  void Add(const StepPlan& plan, uint64_t plan_hash, int64_t now_us);

  // INTERNAL: not the next step of that rank, or it ran another plan than was sent; one line that
  // names the rank.
  absl::Status Take(uint32_t rank, StepDone done);

  // The oldest step in flight, once every rank has done it. INTERNAL: the ranks went on with
  // different tokens, rank 0 with others than it tells, or one does not say with which; one line
  // that names the rank.
  absl::StatusOr<std::optional<FinishedStep>> TakeFinished(int64_t now_us);

  bool idle() const { return in_flight_.empty(); }
  uint64_t group_epoch() const { return group_epoch_; }
  // Every rank has done it; of the first plan the number before it; 0: there was none.
  uint64_t last_finished_step() const { return first_step_ + num_finished_ - 1; }
  std::optional<RunningStep> running() const;
  // The time until now does not count: nobody could have answered.
  void RestartClock(int64_t now_us) { last_finished_us_ = now_us; }

 private:
  struct Step {
    uint64_t plan_hash = 0;
    int num_sequences = 0;
    int num_tokens = 0;
    StepShape shape = {};
    int64_t sent_us = 0;
    std::vector<std::optional<StepDone>> done = {};  // by rank
  };

  uint64_t last_step() const { return last_finished_step() + in_flight_.size(); }

  uint64_t group_epoch_;
  uint64_t first_step_ = 1;         // number of the first plan
  std::vector<uint64_t> num_done_;  // steps, by rank
  std::deque<Step> in_flight_;      // from step first_step_ + num_finished_ on
  uint64_t num_finished_ = 0;
  int64_t last_finished_us_ = 0;
};

}  // namespace wintserve
