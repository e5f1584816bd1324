// The simulated ranks with the streams between them and the API server.
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

class RankGroup {
 public:
  // The oldest plan is done on every rank.
  using DoneFunction =
      std::function<void(uint64_t step, const std::vector<SampledToken>& sampled, int64_t step_us)>;

  RankGroup(const SimulationConfig& config, const References* references, EventQueue* events,
            Report* report, DoneFunction on_done);

  // REQUIRES: no plan in flight.
  void AttachPool(uint64_t pool_epoch, int num_blocks);
  // To every rank; each gets it, runs it and answers at its own pace, in order.
  void Send(StepPlan plan);
  size_t num_plans_in_flight() const { return in_flight_.size(); }

 private:
  struct Member {
    std::unique_ptr<SimulatedRank> rank;
    OrderedDelay to_rank;
    OrderedDelay from_rank;
    int64_t free_at_us = 0;  // when it can take up the next plan
    double slowness = 1;
  };
  struct InFlight {
    uint64_t step = 0;
    int64_t sent_at_us = 0;
    std::vector<RankResult> results;    // that have arrived, by arrival
    std::vector<SampledToken> sampled;  // rank 0's
  };

  void Run(size_t rank, std::shared_ptr<const StepPlan> plan);
  void OnResult(size_t rank, uint64_t step, RankResult result);
  int64_t DurationUs(const StepPlan& plan, double slowness);

  const SimulationConfig& config_;
  EventQueue& events_;
  Report& report_;
  const DoneFunction on_done_;
  Random random_;
  std::vector<Member> members_;
  std::deque<InFlight> in_flight_;
  int64_t last_done_us_ = 0;
};

}  // namespace wintserve::simulation
