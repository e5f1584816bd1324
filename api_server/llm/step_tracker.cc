#include "api_server/llm/step_tracker.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "api_server/work_queue/messages.h"
#include "common/check.h"

namespace wintserve {

void StepTracker::Add(const StepPlan& plan, uint64_t plan_hash, int64_t now_us) {
  if (num_finished_ == 0 && idle()) first_step_ = plan.step;
  CHECK(plan.step == last_step() + 1, "step={} last={}", plan.step, last_step());
  Step step{.plan_hash = plan_hash,
            .num_sequences = static_cast<int>(plan.rows.size()),
            .sent_us = now_us};
  for (const PlanRow& row : plan.rows) {
    step.num_tokens += static_cast<int>(row.length);
    if (row.length == 1) {
      ++step.shape.num_decodes;
    } else {
      step.shape.num_prefill_tokens += static_cast<int>(row.length);
    }
  }
  step.shape.num_copies = static_cast<int>(plan.copies.size());
  step.done.resize(num_done_.size());
  in_flight_.push_back(std::move(step));
}

absl::Status StepTracker::Take(uint32_t rank, StepDone done) {
  CHECK(rank < num_done_.size(), "rank={}", rank);
  const uint64_t expected = first_step_ + num_done_[rank];
  if (done.step != expected || expected > last_step() || done.group_epoch != group_epoch_) {
    return absl::InternalError(fmt::format(
        "engine worker {} reports step {} of group epoch {:x} done; it was sent steps up to {} of "
        "{:x} and has done {}",
        rank, done.step, done.group_epoch, last_step(), group_epoch_, expected - 1));
  }
  Step& step = in_flight_[num_done_[rank] - num_finished_];
  if (done.plan_hash != step.plan_hash) {
    return absl::InternalError(
        fmt::format("engine worker {} ran another plan as step {}: hash {:016x}, sent was {:016x}",
                    rank, done.step, done.plan_hash, step.plan_hash));
  }
  step.done[rank] = std::move(done);
  ++num_done_[rank];
  return absl::OkStatus();
}

absl::StatusOr<std::optional<FinishedStep>> StepTracker::TakeFinished(int64_t now_us) {
  if (idle()) return std::nullopt;
  Step& step = in_flight_.front();
  if (!std::all_of(step.done.begin(), step.done.end(),
                   [](const auto& done) { return done.has_value(); })) {
    return std::nullopt;
  }
  FinishedStep finished{.step = last_finished_step() + 1,
                        .sampled = std::move(step.done[0]->sampled),
                        .prompt_logprobs = std::move(step.done[0]->prompt_logprobs),
                        .num_sequences = step.num_sequences,
                        .num_tokens = step.num_tokens,
                        .shape = step.shape,
                        .latency_us = now_us - step.sent_us,
                        .running_us = now_us - std::max(step.sent_us, last_finished_us_)};
  const uint64_t digest = step.done[0]->sampled_digest;
  for (uint32_t rank = 0; rank < step.done.size(); ++rank) {
    const StepDone& done = *step.done[rank];
    finished.execute_us = std::max(finished.execute_us, done.execute_us);
    if (done.sampled_digest == 0) {
      return absl::InternalError(
          fmt::format("engine worker {} does not say which tokens it went on with after step {}",
                      rank, finished.step));
    }
    if (done.sampled_digest != digest) {
      return absl::InternalError(
          fmt::format("engine workers 0 and {} went on with different tokens after step {}: digest "
                      "{:016x} and {:016x}",
                      rank, finished.step, digest, done.sampled_digest));
    }
  }
  std::vector<int32_t> told;
  told.reserve(finished.sampled.size());
  for (const SampledToken& sampled : finished.sampled) told.push_back(sampled.token);
  if (const uint64_t digest_of_told = SampledDigest(told); digest_of_told != digest) {
    return absl::InternalError(
        fmt::format("engine worker 0 tells other tokens of step {} than it went on with: digest "
                    "{:016x} and {:016x}",
                    finished.step, digest_of_told, digest));
  }
  in_flight_.pop_front();
  ++num_finished_;
  last_finished_us_ = now_us;
  return finished;
}

std::optional<RunningStep> StepTracker::running() const {
  if (idle()) return std::nullopt;
  const Step& step = in_flight_.front();
  const auto missing = std::find_if(step.done.begin(), step.done.end(),
                                    [](const auto& done) { return !done.has_value(); });
  return RunningStep{.step = last_finished_step() + 1,
                     .shape = step.shape,
                     .began_us = std::max(step.sent_us, last_finished_us_),
                     .missing_rank = static_cast<uint32_t>(missing - step.done.begin())};
}

}  // namespace wintserve
