#include "tests/simulation/rank_group.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace wintserve::simulation {

RankGroup::RankGroup(const SimulationConfig& config, const References* references,
                     EventQueue* events, Report* report, Events notify)
    : config_(config),
      references_(*references),
      events_(*events),
      report_(*report),
      notify_(std::move(notify)),
      random_(config.seed, /*stream=*/2),
      fault_random_(config.seed, /*stream=*/6) {
  members_.resize(static_cast<size_t>(config.num_ranks));
  for (size_t rank = 0; rank < members_.size(); ++rank) {
    Launch(rank);
    members_[rank].slowness = static_cast<double>(random_.Between(80, 150)) / 100;
  }
}

void RankGroup::Launch(size_t rank) {
  Member& member = members_[rank];
  member.process =
      std::make_unique<SimulatedRank>(config_, static_cast<int>(rank), &references_, &report_);
  ++member.process_id;
  member.dying = false;
  member.hangs = false;
  member.to_rank = {};
  member.from_rank = {};
  member.free_at_us = events_.now_us();
}

void RankGroup::AttachPool(uint64_t pool_epoch, int num_blocks) {
  CHECK(in_flight_.empty());
  pool_epoch_ = pool_epoch;
  for (Member& member : members_) {
    member.memory = std::make_unique<RankMemory>(config_, pool_epoch, num_blocks);
    DropPending(&member);
    if (member.process) member.process->AttachPool(pool_epoch, member.memory.get());
  }
}

void RankGroup::Send(StepPlan plan) {
  if (!ready()) report_.Violation("plan", "step {} is sent to no group", plan.step);
  in_flight_.push_back(
      InFlight{.step = plan.step, .sent_at_us = events_.now_us(), .results = {}, .of_rank_0 = {}});
  const auto shared = std::make_shared<const StepPlan>(std::move(plan));
  for (size_t rank = 0; rank < members_.size(); ++rank) {
    Member& member = members_[rank];
    const int64_t arrival = member.to_rank.Arrival(
        events_.now_us(), random_.Around(static_cast<double>(config_.worker_latency_us)));
    const int64_t start_us = std::max(member.free_at_us, arrival);
    member.free_at_us = start_us + DurationUs(*shared, member.slowness);
    if (!IsCurrent(rank, member.stream_id) || member.dying) continue;
    member.pending.push_back({shared, group_epoch_, start_us});
    if (member.hangs) continue;
    events_.At(member.free_at_us, [this, rank, num_drops = member.num_drops] {
      if (members_[rank].num_drops == num_drops) Run(rank);
    });
  }
}

// The oldest one that it has received.
void RankGroup::Run(size_t rank) {
  Member& member = members_[rank];
  const Pending pending = std::move(member.pending.front());
  member.pending.pop_front();
  if (!CheckMayWrite(rank, pending)) return;
  RankResult result = member.process->Execute(*pending.plan);
  const int64_t arrival = member.from_rank.Arrival(
      events_.now_us(), random_.Around(static_cast<double>(config_.worker_latency_us)));
  events_.At(arrival, [this, rank, step = pending.plan->step, epoch = pending.group_epoch,
                       result = std::move(result)] {
    const bool is_late = !ready() && config_.mistake != Mistake::kTakeLateResults;
    if (!is_late && epoch == group_epoch_) OnResult(rank, step, result);
  });
}

void RankGroup::OnResult(size_t rank, uint64_t step, RankResult result) {
  const auto plan = std::find_if(in_flight_.begin(), in_flight_.end(),
                                 [step](const InFlight& flight) { return flight.step == step; });
  if (plan == in_flight_.end()) {
    report_.Violation("I6", "rank {} has a result of step {}, which is not in flight", rank, step);
    return;
  }
  if (rank == 0) plan->of_rank_0 = result;
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
  InFlight done = std::move(in_flight_.front());
  in_flight_.pop_front();
  const int64_t step_us = events_.now_us() - std::max(done.sent_at_us, last_done_us_);
  last_done_us_ = events_.now_us();
  notify_.on_done(done.step, std::move(done.of_rank_0), step_us);
}

int64_t RankGroup::DurationUs(const StepPlan& plan, double slowness) {
  int64_t num_tokens = 0;
  for (const PlanRow& row : plan.rows) num_tokens += row.length;
  double us = static_cast<double>(config_.step_us + config_.token_us * num_tokens) * slowness;
  us *= static_cast<double>(random_.Between(80, 140)) / 100;
  if (random_.Chance(0.01)) us *= 10;
  return static_cast<int64_t>(us);
}

// What a fenced group writes could hit a block that somebody else has by now.
bool RankGroup::CheckMayWrite(size_t rank, const Pending& pending) {
  if (pending.group_epoch > fenced_epoch_) return true;
  report_.Violation("I5", "rank {} writes in step {} of group {}, which was fenced", rank,
                    pending.plan->step, pending.group_epoch);
  return false;
}

}  // namespace wintserve::simulation
