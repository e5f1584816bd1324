// The sequences that a worker holds, one a slot, and the rules that a plan must keep.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "api_server/scheduler/plan.h"

namespace wintserve {

struct SlotLimits {
  uint32_t max_slots = 0;
  uint32_t max_tokens = 0;  // of one plan, all rows together
  uint32_t max_sequence_tokens = 0;
  uint32_t num_blocks = 0;  // of the pool
  uint32_t block_size_tokens = 64;
  int32_t vocab_size = 0;
};

struct Slot {
  bool in_use = false;
  SamplingParams sampling;
  std::vector<int32_t> block_table;
  // Unknown until the first row: a cached prefix may precede it.
  std::optional<uint32_t> next_position;
  bool has_token = false;  // one was sampled from the last row's logits and is not computed yet
};

// Threading: thread-compatible.
// Errors:    INVALID_ARGUMENT, naming slot, value and what is allowed. A plan that breaks a rule is
//            a bug of whoever made it; the table is of no use afterwards.
class SlotTable {
 public:
  explicit SlotTable(const SlotLimits& limits);

  // Applies slot_init and block_append, then checks rows and slot_release against the result.
  absl::Status BeginStep(const StepPlan& plan);
  // Once the rows have been handed to the device.
  void FinishStep(const StepPlan& plan);

  // REQUIRES: a slot of a row of the plan that began last.
  const Slot& slot(uint32_t index) const { return slots_[index]; }

 private:
  absl::Status Init(const SlotInit& init);
  absl::Status CheckBiases(uint32_t slot, const SamplingParams& sampling) const;
  absl::Status CheckHistory(const SlotInit& init) const;
  absl::Status Append(uint32_t slot, const std::vector<BlockId>& blocks);
  absl::Status CheckRow(const PlanRow& row) const;
  absl::Status CheckTokens(const PlanRow& row) const;
  absl::Status CheckPromptLogprobs(const PlanRow& row) const;
  absl::Status CheckInUse(const char* where, uint32_t slot) const;
  // Marks the slot as named by `list` of this step; an error the second time.
  absl::Status NameOnce(const char* list, uint32_t slot, std::vector<uint64_t>* last_step);

  const SlotLimits limits_;
  std::vector<Slot> slots_;
  uint64_t step_ = 0;
  std::vector<uint64_t> row_step_;  // by slot: the last step with a row of it
  std::vector<uint64_t> release_step_;
};

}  // namespace wintserve
