#include "tests/simulation/rank_group.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace wintserve::simulation {

RankGroup::RankGroup(const SimulationConfig& config, const References* references,
                     EventQueue* events, Report* report, DoneFunction on_done)
    : config_(config),
      events_(*events),
      report_(*report),
      on_done_(std::move(on_done)),
      random_(config.seed, /*stream=*/2) {
  for (int rank = 0; rank < config.num_ranks; ++rank) {
    Member& member = members_.emplace_back();
    member.rank = std::make_unique<SimulatedRank>(config, rank, references, report);
    member.slowness = static_cast<double>(random_.Between(80, 150)) / 100;
  }
}

void RankGroup::AttachPool(uint64_t pool_epoch, int num_blocks) {
  CHECK(in_flight_.empty());
  for (Member& member : members_) member.rank->AttachPool(pool_epoch, num_blocks);
}

void RankGroup::Send(StepPlan plan) {
  in_flight_.push_back(
      InFlight{.step = plan.step, .sent_at_us = events_.now_us(), .results = {}, .sampled = {}});
  const auto shared = std::make_shared<const StepPlan>(std::move(plan));
  for (size_t rank = 0; rank < members_.size(); ++rank) {
    Member& member = members_[rank];
    const int64_t arrival = member.to_rank.Arrival(
        events_.now_us(), random_.Around(static_cast<double>(config_.worker_latency_us)));
    member.free_at_us = std::max(member.free_at_us, arrival) + DurationUs(*shared, member.slowness);
    events_.At(member.free_at_us, [this, rank, shared] { Run(rank, shared); });
  }
}

void RankGroup::Run(size_t rank, std::shared_ptr<const StepPlan> plan) {
  Member& member = members_[rank];
  RankResult result = member.rank->Execute(*plan);
  const int64_t arrival = member.from_rank.Arrival(
      events_.now_us(), random_.Around(static_cast<double>(config_.worker_latency_us)));
  events_.At(arrival, [this, rank, step = plan->step, result = std::move(result)] {
    OnResult(rank, step, result);
  });
}

void RankGroup::OnResult(size_t rank, uint64_t step, RankResult result) {
  const auto plan = std::find_if(in_flight_.begin(), in_flight_.end(),
                                 [step](const InFlight& flight) { return flight.step == step; });
  CHECK(plan != in_flight_.end());
  if (rank == 0) plan->sampled = result.sampled;
  plan->results.push_back(std::move(result));
  const RankResult& first = plan->results.front();
  const RankResult& latest = plan->results.back();
  if (latest.plan_digest != first.plan_digest || latest.sampled_digest != first.sampled_digest) {
    report_.Violation("I6", "step {}: rank {} differs from another in {}", step, rank,
                      latest.plan_digest != first.plan_digest ? "its plans" : "what it sampled");
  }
  // A rank answers in order, so a plan is never complete before the one sent before it.
  if (plan->results.size() < members_.size()) return;
  CHECK(plan == in_flight_.begin());
  const InFlight done = std::move(in_flight_.front());
  in_flight_.pop_front();
  const int64_t step_us = events_.now_us() - std::max(done.sent_at_us, last_done_us_);
  last_done_us_ = events_.now_us();
  on_done_(done.step, done.sampled, step_us);
}

int64_t RankGroup::DurationUs(const StepPlan& plan, double slowness) {
  int64_t num_tokens = 0;
  for (const PlanRow& row : plan.rows) num_tokens += row.length;
  double us = static_cast<double>(config_.step_us + config_.token_us * num_tokens) * slowness;
  us *= static_cast<double>(random_.Between(80, 140)) / 100;
  if (random_.Chance(0.01)) us *= 10;
  return static_cast<int64_t>(us);
}

}  // namespace wintserve::simulation
