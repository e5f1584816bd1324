// Executes plans: keeps the slots, builds batches for the model, samples, and shares the ids.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "engine_worker/collectives/collective.h"
#include "engine_worker/model/model.h"
#include "engine_worker/runner/slot_table.h"
#include "kernels/cpu/sampling.h"

namespace wintserve {

struct StepRunnerConfig {
  uint64_t group_epoch = 0;
  uint64_t pool_epoch = 0;
  uint32_t num_blocks = 0;
  uint32_t block_size_tokens = 64;
  uint32_t max_slots = 0;
  uint32_t max_tokens = 0;  // of one plan
  uint32_t max_sequence_tokens = 0;
  uint32_t sampled_vocab_size = 0;  // ids at and above are never sampled
};

// One rank's executor of one group_epoch on one pool. Every rank applies the same plans in the same
// order; rank 0 samples, the others get the ids from it.
//
// A plan may hold more tokens than the model takes at once: it then runs as several forward passes,
// which gives the same bits where the model is deterministic.
//
// Ownership: borrows model, collective and pool.
// Threading: one thread.
// Errors:    INVALID_ARGUMENT, FAILED_PRECONDITION: the plan breaks a rule (another epoch, a gap in
//            the chain of plans, a slot, block, position or token out of place); found before the
//            model runs, and alike on every rank. UNAVAILABLE: a peer is gone. Others come from the
//            model. After any error the runner is of no use.
class StepRunner {
 public:
  // INVALID_ARGUMENT: the model cannot serve this configuration; names the number.
  static absl::StatusOr<std::unique_ptr<StepRunner>> Create(const StepRunnerConfig& config,
                                                            Model* model, Collective* collective,
                                                            void* kv_pool);

  // One small forward pass on block 0, on all ranks together, so that the first request does not
  // pay for what happens once. Before the first plan only: it overwrites the block.
  absl::Status WarmUp();

  // plan_hash: of the plan's bytes as received.
  absl::StatusOr<StepDone> Apply(const StepPlan& plan, uint64_t plan_hash);

 private:
  StepRunner(const StepRunnerConfig& config, Model* model, Collective* collective, void* kv_pool);

  absl::Status CheckChain(const StepPlan& plan) const;
  absl::Status RunRows(const StepPlan& plan);
  void AddToBatch(const PlanRow& row, uint32_t offset, uint32_t length);
  absl::Status RunBatch();
  absl::Status Sample(std::span<const float> logits);
  absl::Status ShareSampledIds(size_t num_sampled);

  const StepRunnerConfig config_;
  Model* const model_;
  Collective* const collective_;
  void* const kv_pool_;
  const size_t batch_tokens_;

  SlotTable slots_;
  uint64_t last_step_ = 0;
  uint64_t last_plan_hash_ = 0;

  // Of the step at work; members for their memory.
  Batch batch_;
  std::vector<const PlanRow*> batch_samples_;  // rows whose logits the batch yields
  std::vector<int32_t> sampled_ids_;           // rank 0 until they are shared
  kernels::cpu::Sampler sampler_;
};

}  // namespace wintserve
