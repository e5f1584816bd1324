// The engine's metrics, by the names that FastDeploy dashboards ask for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "api_server/llm/group_lifecycle.h"
#include "api_server/scheduler/scheduler.h"

namespace prometheus {
class Registry;
}

namespace wintserve {

// What stays the same while the engine has one pool.
struct EngineFacts {
  int max_num_seqs = 0;
  int max_model_len = 0;
  int max_num_batched_tokens = 0;
  int block_size_tokens = 0;
  int num_blocks = 0;
  int num_host_blocks = 0;
  uint64_t pool_bytes = 0;  // over all ranks
  bool prefix_caching = false;
};

// Threading: one thread records; reading the registry is thread-safe. Durations are in seconds.
class EngineMetrics {
 public:
  explicit EngineMetrics(std::shared_ptr<prometheus::Registry> registry);
  ~EngineMetrics();

  // Once a pool.
  void RecordFacts(const EngineFacts& facts);
  void RecordArrival(int num_prompt_tokens, int max_tokens);
  void RecordStart(double queue_seconds);
  // Once a request, at its first admission. hit: part of its prompt was cached.
  void RecordCacheLookup(bool hit);
  void RecordFirstToken(double since_arrival_seconds, double since_start_seconds);
  void RecordGeneratedTokens(int num_tokens);
  void RecordNextToken(double since_last_token_seconds);
  void RecordSuccess(double since_arrival_seconds, double since_start_seconds,
                     double since_first_token_seconds, int num_prompt_tokens,
                     int num_generated_tokens);
  // step: plan sent -> done on every rank; execute: of it, what the slowest rank spent on the plan.
  void RecordStep(double step_seconds, double execute_seconds, int num_sequences, int num_tokens);
  // schedule: done -> next plan sent.
  void RecordSchedule(double schedule_seconds);
  void RecordState(const SchedulerStats& stats);
  // Nothing runs or waits any more, whatever the scheduler held; `last` brings its totals.
  void RecordStop(const SchedulerStats& last);
  // The session with the cache manager ended; its pool was replaced by a new one.
  void RecordCacheLoss();
  void RecordPoolReplacement();
  // A rank group was lost to `cause`. Recovery: from its first fault until a group was in use
  // again.
  void RecordGroupLoss(FaultCause cause);
  void RecordRecovery(double recovery_seconds);
  // A worker's message of a group or pool that is over.
  void RecordStaleMessage();
  // A request failed, since the group was lost whenever it ran.
  void RecordPoisonRequest();

 private:
  struct Series;

  void SetGauges(const SchedulerStats& stats);
  void RecordTotals(const SchedulerStats& stats);

  std::unique_ptr<Series> series_;
};

}  // namespace wintserve
