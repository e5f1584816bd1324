// One serving instance on a virtual clock: the real scheduler and the real prefix cache, between
// them and around them simulated processes, connections and clients.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "api_server/scheduler/scheduler.h"
#include "tests/simulation/cache_process.h"
#include "tests/simulation/clients.h"
#include "tests/simulation/config.h"
#include "tests/simulation/event_queue.h"
#include "tests/simulation/ledger.h"
#include "tests/simulation/random.h"
#include "tests/simulation/rank_group.h"
#include "tests/simulation/reference.h"
#include "tests/simulation/report.h"

namespace wintserve::simulation {

// Does for the scheduler what the API server's engine thread does.
class Instance {
 public:
  Instance(const SimulationConfig& config, Report::Tracing tracing);

  // Until nothing is left to happen, or the first violation.
  void Run();
  const Report& report() const { return report_; }

 private:
  void ScheduleFaults();
  void KillServer();
  void AddSchedulerTotals();
  // Lets the scheduler decide until it makes no plan.
  void Pump();
  void Send(const CacheCommand& command);
  void Send(StepPlan plan);
  void ArmDeadline();

  void OnCacheReply(const CacheReply& reply, uint32_t num_available);
  void OnCacheLost();
  void OnCacheResumed();
  void OnPoolGone();
  void OnPoolOpened(int num_blocks);
  void OnPoolAdopted(uint32_t num_available);
  void OnStepDone(uint64_t step, RankResult result, int64_t step_us);
  void OnGroupFrozen();
  void OnGroupFenced(bool kv_trusted);
  void DistrustLastSteps();
  void Distrust();
  void OnGroupReady();
  // What had to wait until no plan was in flight, and nothing of a group that is given up.
  void CarryOnIfDrained();
  bool IsPaused() const { return waiting_ != Waiting::kForNothing || !ranks_.ready(); }
  void UpdatePause() {
    if (scheduler_.has_value()) scheduler_->SetPaused(IsPaused());
  }

  void CheckScheduler();
  void CheckQuiescent();

  const SimulationConfig config_;
  EventQueue clock_;
  Report report_;
  References references_;
  std::optional<Scheduler> scheduler_;  // none: there is no API server
  Ledger ledger_;
  CacheProcess cache_;
  RankGroup ranks_;
  Clients clients_;

  enum class Waiting { kForNothing, kToResume, kToOpenPool, kForPool };

  bool has_session_ = true;                 // as the scheduler was told
  Waiting waiting_ = Waiting::kForNothing;  // the scheduler is paused meanwhile
  uint64_t pool_epoch_ = 1;
  uint64_t first_step_ = 0;  // of this API server
  uint64_t last_step_ = 0;
  uint64_t last_done_step_ = 0;
  // The cache manager may not have heard yet that the steps from this one on are not trusted.
  std::optional<uint64_t> first_bad_step_;
  int num_distrusts_unanswered_ = 0;  // in this session
  // While there is no API server: what the next one hears of the ranks, and whether it does now.
  bool kv_trusted_without_server_ = true;
  bool is_adopting_ = false;
  Random random_;
  std::optional<int64_t> armed_deadline_us_;
};

}  // namespace wintserve::simulation
