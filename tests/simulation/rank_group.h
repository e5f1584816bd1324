// The simulated ranks with the streams between them and the API server: processes that execute
// plans, die, hang, leave their group and come back, and the life of the rank group that they form.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "api_server/scheduler/plan.h"
#include "tests/simulation/config.h"
#include "tests/simulation/event_queue.h"
#include "tests/simulation/random.h"
#include "tests/simulation/rank.h"
#include "tests/simulation/reference.h"
#include "tests/simulation/report.h"

namespace wintserve::simulation {

// ready    -> aborting  a rank's end is noticed: no plan is sent any more, no result is taken,
// every
//                       rank is told to leave the group
// aborting -> waiting   each has left it, or has been reaped: it is fenced
// waiting  -> starting  a process of every rank is there: they form a new group
// starting -> ready     all of them have joined it
// starting -> aborting  a rank's end is noticed
class RankGroup {
 public:
  struct Events {
    // The oldest plan is done on every rank. `result`: of rank 0.
    std::function<void(uint64_t step, RankResult result, int64_t step_us)> on_done;
    std::function<void()> on_frozen;  // the group is not ready any more
    // Nothing that its ranks started writes to memory any more. May come again while the group is
    // not ready, when another process turns out to have gone wrong.
    std::function<void(bool kv_trusted)> on_fenced;
    std::function<void()> on_ready;
  };

  // Ready, without a pool.
  RankGroup(const SimulationConfig& config, const References* references, EventQueue* events,
            Report* report, Events notify);

  // REQUIRES: no plan in flight. (Every process has unmapped the old pool, or is gone.)
  void AttachPool(uint64_t pool_epoch, int num_blocks);
  // To every rank; each gets it, runs it and answers at its own pace, in order.
  void Send(StepPlan plan);
  // Until the group is fenced.
  size_t num_plans_in_flight() const { return in_flight_.size(); }
  bool ready() const { return state_ == State::kReady; }
  bool aborting() const { return state_ == State::kAborting; }

  // No plan is sent, and no result taken, any more; on_fenced follows, unless the group is over.
  void Abort();
  // No effect on a process that is failing already, or not there.
  void Fail(int rank, WorkerFailure failure);

 private:
  enum class State { kReady, kAborting, kWaiting, kStarting };

  struct Pending {  // received, or about to be
    std::shared_ptr<const StepPlan> plan;
    uint64_t group_epoch = 0;
    int64_t start_us = 0;
  };
  struct Member {
    std::unique_ptr<RankMemory> memory;
    std::unique_ptr<SimulatedRank> process;  // null: there is none
    uint64_t process_id = 0;                 // of the newest one; messages of older ones are late
    bool dying = false;
    bool hangs = false;
    std::deque<Pending> pending;
    uint64_t num_drops = 0;  // of pending plans: what was scheduled before is void
    OrderedDelay to_rank;
    OrderedDelay from_rank;
    int64_t free_at_us = 0;  // when it can take up the next plan
    double slowness = 1;
    // As the API server knows it.
    uint64_t stream_id = 1;  // the process that its messages go to
    bool attached = true;
    bool fenced = false;
    bool joined = true;
    bool exit_known = false;  // of the process before the one that is attached
  };
  struct InFlight {
    uint64_t step = 0;
    int64_t sent_at_us = 0;
    std::vector<RankResult> results;  // that have arrived, by arrival
    RankResult of_rank_0;
  };

  // rank_group.cc: a group that is ready.
  void Launch(size_t rank);
  void Run(size_t rank);
  void OnResult(size_t rank, uint64_t step, RankResult result);
  int64_t DurationUs(const StepPlan& plan, double slowness);
  bool CheckMayWrite(size_t rank, const Pending& pending);

  // rank_group_recovery.cc
  void Die(size_t rank, bool kv_trusted);
  void Hang(size_t rank);
  void WriteLate(size_t rank, bool kv_trusted);
  void DropPending(Member* member);
  StepPlan BeginningOf(const StepPlan& plan);
  void OnReaped(size_t rank, bool kv_trusted);
  void OnExitNotice(size_t rank, uint64_t process_id, bool kv_trusted);
  void OnStreamDropped(size_t rank, uint64_t process_id);
  void OnAttached(size_t rank, uint64_t process_id);
  void OnAbort(size_t rank, uint64_t process_id);
  void OnAborted(size_t rank, uint64_t process_id, uint64_t group_epoch);
  void EndThoseThatStay(uint64_t group_epoch);
  void SetFenced(size_t rank);
  void StartIfComplete();
  void Join(size_t rank, uint64_t process_id, uint64_t group_epoch);
  void OnJoined(size_t rank, uint64_t process_id, uint64_t group_epoch);
  // Where one process of that id is still the rank's.
  bool IsCurrent(size_t rank, uint64_t process_id) const;
  int64_t WorkerLatencyUs();

  const SimulationConfig& config_;
  const References& references_;
  EventQueue& events_;
  Report& report_;
  const Events notify_;
  Random random_;
  Random fault_random_;
  std::vector<Member> members_;
  std::deque<InFlight> in_flight_;
  int64_t last_done_us_ = 0;

  State state_ = State::kReady;
  uint64_t group_epoch_ = 1;
  uint64_t fenced_epoch_ = 0;  // newest one of which every rank is fenced
  bool kv_trusted_ = true;     // of the group that is being aborted
  uint64_t pool_epoch_ = 0;
};

}  // namespace wintserve::simulation
