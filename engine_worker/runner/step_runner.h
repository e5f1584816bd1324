// Executes plans: keeps the slots, builds batches for the model, samples, and shares the ids.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "engine_worker/collectives/collective.h"
#include "engine_worker/model/model.h"
#include "engine_worker/runner/block_copier.h"
#include "engine_worker/runner/slot_table.h"
#include "kernels/cpu/sampling.h"

namespace wintserve {

// A place in a group's chain of plans: the plan that a rank executed last. 0, 0: none yet.
struct PlanChain {
  uint64_t step = 0;
  uint64_t plan_hash = 0;
};

struct StepRunnerConfig {
  uint64_t group_epoch = 0;
  uint64_t pool_epoch = 0;
  uint32_t num_blocks = 0;
  uint32_t num_host_slots = 0;
  uint32_t block_size_tokens = 64;
  uint32_t max_slots = 0;
  uint32_t max_tokens = 0;  // of one plan
  uint32_t max_sequence_tokens = 0;
  uint32_t sampled_vocab_size = 0;     // ids at and above are never sampled
  std::vector<int32_t> stop_ids = {};  // not sampled before a slot's first_stop_position
  // Where the first plan goes on. The chain is the group's: steps are counted and plans chained
  // over a replacement of the pool, which only empties the slots.
  PlanChain chain = {};
};

// One rank's executor of one group_epoch on one pool. Every rank applies the same plans in the same
// order; rank 0 samples, the others get the ids from it.
//
// What a plan asks for runs in this order: copies, slot_init, block_append, rows, slot_release.
//
// A plan may hold more tokens than the model takes at once: it then runs as several forward passes,
// which gives the same bits where the model is deterministic.
//
// Ownership: borrows model, collective, pool and host tier.
// Threading: one thread.
// Errors:    INVALID_ARGUMENT, FAILED_PRECONDITION: the plan breaks a rule (another epoch, a gap in
//            the chain of plans, a slot, block, position or token out of place); found before the
//            model runs, and alike on every rank. UNAVAILABLE: a peer is gone. Others come from the
//            model. After any error the runner is of no use.
class StepRunner {
 public:
  // kv_pool [num_blocks, block bytes], host_tier [num_host_slots, block bytes]: mapped host memory;
  // host_tier is null when there are no host slots.
  // INVALID_ARGUMENT: the model cannot serve this configuration; names the number.
  static absl::StatusOr<std::unique_ptr<StepRunner>> Create(const StepRunnerConfig& config,
                                                            Model* model, Collective* collective,
                                                            void* kv_pool, void* host_tier);

  // One small forward pass on block 0, on all ranks together, so that the first request does not
  // pay for what happens once. Before the first plan only: it overwrites the block.
  absl::Status WarmUp();

  // plan_hash: of the plan's bytes as received.
  absl::StatusOr<StepDone> Apply(const StepPlan& plan, uint64_t plan_hash);

  // For the runner of the next pool.
  const PlanChain& chain() const { return chain_; }

 private:
  StepRunner(const StepRunnerConfig& config, Model* model, Collective* collective, void* kv_pool,
             void* host_tier);

  absl::Status CheckChain(const StepPlan& plan) const;
  absl::Status RunRows(const StepPlan& plan);
  void AddToBatch(const PlanRow& row, uint32_t offset, uint32_t length);
  absl::Status RunBatch();
  absl::Status Sample(std::span<const float> logits);
  kernels::cpu::SampleRequest RequestOf(const PlanRow& row) const;
  absl::Status ShareSampledIds(size_t num_sampled);

  const StepRunnerConfig config_;  // stop_ids in rising order, each once
  Model* const model_;
  Collective* const collective_;
  void* const kv_pool_;
  const size_t batch_tokens_;

  BlockCopier copier_;
  SlotTable slots_;
  PlanChain chain_;

  // Of the step at work; members for their memory.
  Batch batch_;
  std::vector<const PlanRow*> batch_samples_;  // rows whose logits the batch yields
  std::vector<int32_t> sampled_ids_;           // rank 0 until they are shared
  kernels::cpu::Sampler sampler_;
};

}  // namespace wintserve
