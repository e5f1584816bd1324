#include "api_server/scheduler/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr int32_t kEos = 2;
constexpr int32_t kWord = 50;

// Grants every lease that fits and answers every plan, with tokens of the test's choosing.
class Harness {
 public:
  explicit Harness(SchedulerConfig config)
      : config_(WithDefaults(std::move(config))), scheduler_(config_) {
    for (int i = 0; i < config_.num_blocks; ++i) free_.push_back({BlockId{i}, 0});
  }

  uint64_t Submit(int prompt_len, int max_tokens, int num_choices = 1) {
    std::vector<int32_t> prompt(prompt_len);
    std::iota(prompt.begin(), prompt.end(), 100);
    const absl::Status status = scheduler_.Submit({.id = ++last_id_,
                                                   .prompt_ids = prompt,
                                                   .sampling = {.seed = 7},
                                                   .num_choices = num_choices,
                                                   .max_tokens = max_tokens});
    EXPECT_TRUE(status.ok()) << status;
    return last_id_;
  }

  // Settles leases and returns the next plan; empty when there is nothing to do.
  std::optional<StepPlan> NextPlan() {
    for (;;) {
      SchedulerOutput output = scheduler_.Schedule();
      free_.insert(free_.end(), output.return_blocks.begin(), output.return_blocks.end());
      failed_.insert(failed_.end(), output.failed.begin(), output.failed.end());
      if (output.plan.has_value()) plan_ = output.plan;
      if (output.lease.has_value()) {
        ++num_leases_;
        scheduler_.OnBlocksLeased(output.lease->tag, Take(output.lease->count));
        continue;
      }
      if (output.plan.has_value()) return output.plan;
      // A plan that was made while leases were still coming in.
      return std::exchange(plan_, std::nullopt);
    }
  }

  std::vector<SequenceToken> Finish(const StepPlan& plan, int32_t token = kWord) {
    plan_.reset();
    std::vector<SampledToken> sampled;
    for (const PlanRow& row : plan.rows) sampled.push_back({row.slot, token});
    auto tokens = scheduler_.OnStepDone(plan.step, sampled);
    EXPECT_TRUE(tokens.ok()) << tokens.status();
    return tokens.value_or(std::vector<SequenceToken>{});
  }

  Scheduler& scheduler() { return scheduler_; }
  int num_free() const { return static_cast<int>(free_.size()); }
  int num_leases() const { return num_leases_; }
  const std::vector<SequenceKey>& failed() const { return failed_; }
  std::vector<LeasedBlock> Take(uint32_t count) {
    if (count > free_.size()) return {};
    std::vector<LeasedBlock> taken(free_.end() - count, free_.end());
    free_.resize(free_.size() - count);
    return taken;
  }

 private:
  static SchedulerConfig WithDefaults(SchedulerConfig config) {
    config.vocab_size = 1000;
    config.eos_ids = {kEos, 3};
    if (config.num_blocks == 0) config.num_blocks = 100;
    return config;
  }

  const SchedulerConfig config_;
  Scheduler scheduler_;
  std::vector<LeasedBlock> free_;
  std::optional<StepPlan> plan_;
  std::vector<SequenceKey> failed_;
  uint64_t last_id_ = 0;
  int num_leases_ = 0;
};

std::vector<int> RowLengths(const StepPlan& plan) {
  std::vector<int> lengths;
  for (const PlanRow& row : plan.rows) lengths.push_back(static_cast<int>(row.length));
  return lengths;
}

TEST(Scheduler, PlansThePromptOnceAndThenOneTokenAStepFromTheSlot) {
  Harness harness({});
  harness.Submit(/*prompt_len=*/3, /*max_tokens=*/3);
  const StepPlan first = *harness.NextPlan();
  EXPECT_EQ(first.step, 1u);
  ASSERT_EQ(first.slot_init.size(), 1u);
  EXPECT_EQ(first.slot_init[0].block_table.size(), 1u);
  EXPECT_EQ(first.slot_init[0].sampling.seed, 7);
  ASSERT_EQ(first.rows.size(), 1u);
  EXPECT_THAT(first.rows[0].tokens, ElementsAre(100, 101, 102));
  EXPECT_TRUE(first.rows[0].sample);
  harness.Finish(first);

  const StepPlan second = *harness.NextPlan();
  EXPECT_THAT(second.slot_init, IsEmpty());
  ASSERT_EQ(second.rows.size(), 1u);
  EXPECT_EQ(second.rows[0].position, 3u);
  EXPECT_THAT(second.rows[0].tokens, IsEmpty());
  harness.Finish(second);
  const StepPlan third = *harness.NextPlan();
  EXPECT_EQ(third.rows[0].position, 4u);
  const auto tokens = harness.Finish(third);
  ASSERT_EQ(tokens.size(), 1u);
  EXPECT_EQ(tokens[0].end, SequenceEnd::kLength);

  const StepPlan release = *harness.NextPlan();
  EXPECT_THAT(release.rows, IsEmpty());
  EXPECT_THAT(release.slot_release, ElementsAre(first.rows[0].slot));
  harness.Finish(release);
  EXPECT_FALSE(harness.NextPlan().has_value());
  EXPECT_EQ(harness.num_free(), 100);
}

TEST(Scheduler, ReservesExactlyTheBlocksThatCanBeWritten) {
  Harness harness({});
  harness.Submit(/*prompt_len=*/64, /*max_tokens=*/1);  // the sampled token is never fed back
  harness.Submit(/*prompt_len=*/64, /*max_tokens=*/2);
  const StepPlan plan = *harness.NextPlan();
  ASSERT_EQ(plan.slot_init.size(), 1u);
  EXPECT_EQ(plan.slot_init[0].block_table.size(), 1u);
  harness.Finish(plan);
  EXPECT_EQ(harness.NextPlan()->slot_init[0].block_table.size(), 2u);
}

TEST(Scheduler, AStopTokenOnTheLastPlaceIsAStop) {
  Harness harness({});
  harness.Submit(3, /*max_tokens=*/1);
  const auto tokens = harness.Finish(*harness.NextPlan(), kEos);
  ASSERT_EQ(tokens.size(), 1u);
  EXPECT_EQ(tokens[0].end, SequenceEnd::kStop);
}

TEST(Scheduler, EveryStopTokenEndsTheSequence) {
  for (const int32_t eos : {2, 3}) {
    Harness harness({});
    harness.Submit(3, /*max_tokens=*/10);
    EXPECT_EQ(harness.Finish(*harness.NextPlan(), eos)[0].end, SequenceEnd::kStop);
    EXPECT_THAT(harness.NextPlan()->rows, IsEmpty());
  }
}

TEST(Scheduler, RunsDecodesFirstAndPromptsWithinTheRowBudget) {
  Harness harness({.max_num_seqs = 8, .max_num_batched_tokens = 20});
  harness.Submit(9, 10);
  harness.Submit(9, 10);
  harness.Submit(9, 10);
  const StepPlan lone = *harness.NextPlan();  // admitted first, since its lease came first
  harness.Finish(lone);
  const StepPlan mixed = *harness.NextPlan();
  EXPECT_THAT(RowLengths(mixed), ElementsAre(1, 9, 9));
}

TEST(Scheduler, APromptBeyondTheBudgetRunsAloneAndDecodesGetEverySecondStep) {
  Harness harness({.max_num_seqs = 4, .max_num_batched_tokens = 20});
  harness.Submit(5, 20);
  harness.Finish(*harness.NextPlan());
  harness.Submit(50, 20);
  harness.Submit(60, 20);
  harness.Finish(*harness.NextPlan());  // a decode, during which the leases come in
  std::vector<std::vector<int>> steps;
  for (int i = 0; i < 4; ++i) {
    const StepPlan plan = *harness.NextPlan();
    steps.push_back(RowLengths(plan));
    harness.Finish(plan);
  }
  EXPECT_THAT(steps, ElementsAre(ElementsAre(50), ElementsAre(1, 1), ElementsAre(60),
                                 ElementsAre(1, 1, 1)));
}

TEST(Scheduler, APromptThatNeverFitsBesideTheDecodesStillRuns) {
  Harness harness({.max_num_seqs = 4, .max_num_batched_tokens = 20});
  harness.Submit(5, 100);
  harness.Finish(*harness.NextPlan());
  harness.Submit(20, 100);  // fits the budget, but not with a decode beside it
  harness.Finish(*harness.NextPlan());
  EXPECT_THAT(RowLengths(*harness.NextPlan()), ElementsAre(20));
}

TEST(Scheduler, ReusesASlotOnlyAfterThePlanThatReleasesItIsDone) {
  Harness harness({.max_num_seqs = 1});
  harness.Submit(3, 1);
  harness.Submit(3, 1);
  harness.Finish(*harness.NextPlan());
  const StepPlan release = *harness.NextPlan();
  EXPECT_THAT(release.slot_release, ElementsAre(0u));
  EXPECT_THAT(release.slot_init, IsEmpty());
  EXPECT_FALSE(harness.scheduler().Schedule().lease.has_value());
  harness.Finish(release);
  EXPECT_EQ(harness.NextPlan()->slot_init.size(), 1u);
}

TEST(Scheduler, TheHeadOfTheQueueIsNotOvertakenByASmallerRequest) {
  Harness harness({.max_num_seqs = 4, .num_blocks = 3});
  const uint64_t first = harness.Submit(64, 65);  // 2 blocks
  harness.Submit(100, 65);                        // 3 blocks: has to wait
  harness.Submit(3, 1);                           // 1 block: would fit
  harness.Finish(*harness.NextPlan());
  for (int i = 0; i < 5; ++i) {
    const StepPlan plan = *harness.NextPlan();
    EXPECT_EQ(plan.rows.size(), 1u);
    harness.Finish(plan);
  }
  EXPECT_EQ(harness.num_leases(), 2);  // refused once, and not asked again while nothing came back
  harness.scheduler().Cancel(first);
  const StepPlan next = *harness.NextPlan();
  EXPECT_THAT(RowLengths(next), IsEmpty());  // made while the lease was on its way
  harness.Finish(next);
  EXPECT_THAT(RowLengths(*harness.NextPlan()), ElementsAre(100));
}

TEST(Scheduler, ARefusalThatCrossedAReturnIsAskedAgain) {
  Harness harness({.max_num_seqs = 4, .num_blocks = 2});
  Scheduler& scheduler = harness.scheduler();
  const uint64_t first = harness.Submit(64, 65);
  harness.Finish(*harness.NextPlan());
  harness.Submit(64, 65);
  const SchedulerOutput asked = scheduler.Schedule();
  ASSERT_TRUE(asked.lease.has_value());
  scheduler.Cancel(first);
  ASSERT_TRUE(asked.plan.has_value());
  harness.Finish(*asked.plan);
  const SchedulerOutput returned = scheduler.Schedule();
  EXPECT_EQ(returned.return_blocks.size(), 2u);
  scheduler.OnBlocksLeased(asked.lease->tag, {});
  EXPECT_TRUE(scheduler.Schedule().lease.has_value());
  EXPECT_THAT(harness.failed(), IsEmpty());
}

TEST(Scheduler, FailsTheHeadWhenAnEmptyPoolRefusesIt) {
  Harness harness({});
  const uint64_t id = harness.Submit(3, 5);
  const SchedulerOutput asked = harness.scheduler().Schedule();
  harness.scheduler().OnBlocksLeased(asked.lease->tag, {});
  EXPECT_THAT(harness.scheduler().Schedule().failed, ElementsAre(SequenceKey{id, 0}));
  EXPECT_EQ(harness.scheduler().stats().num_waiting, 0);
}

TEST(Scheduler, RefusesARequestThatCanNeverFitThePool) {
  Scheduler scheduler({.num_blocks = 2, .vocab_size = 10, .eos_ids = {}});
  const absl::Status status =
      scheduler.Submit({.id = 1, .prompt_ids = std::vector<int32_t>(100), .max_tokens = 40});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(
      status.message(),
      "the request needs 3 KV blocks for 100 prompt tokens and max_tokens 40, the pool has 2");
  EXPECT_EQ(scheduler.stats().num_waiting, 0);
}

TEST(Scheduler, CancelOfASequenceInFlightDropsItsTokenAndReturnsItsBlocksAfterTheStep) {
  Harness harness({});
  const uint64_t id = harness.Submit(3, 10);
  const StepPlan plan = *harness.NextPlan();
  harness.scheduler().Cancel(id);
  EXPECT_THAT(harness.scheduler().Schedule().return_blocks, IsEmpty());
  EXPECT_EQ(harness.num_free(), 99);
  EXPECT_THAT(harness.Finish(plan), IsEmpty());
  EXPECT_THAT(harness.NextPlan()->slot_release, ElementsAre(plan.rows[0].slot));
  EXPECT_EQ(harness.num_free(), 100);
}

TEST(Scheduler, CancelOfAWaitingRequestReturnsTheLeaseThatWasOnItsWay) {
  Harness harness({});
  const uint64_t id = harness.Submit(3, 10);
  const SchedulerOutput asked = harness.scheduler().Schedule();
  harness.scheduler().Cancel(id);
  harness.scheduler().OnBlocksLeased(asked.lease->tag, harness.Take(asked.lease->count));
  const SchedulerOutput output = harness.scheduler().Schedule();
  EXPECT_EQ(output.return_blocks.size(), 1u);
  EXPECT_FALSE(output.plan.has_value());
}

TEST(Scheduler, CancelBeforeTheFirstPlanFreesTheSlotWithoutARelease) {
  Harness harness({.max_num_seqs = 1});
  const uint64_t id = harness.Submit(3, 10);
  const SchedulerOutput asked = harness.scheduler().Schedule();
  harness.scheduler().OnBlocksLeased(asked.lease->tag, harness.Take(asked.lease->count));
  harness.scheduler().Cancel(id);
  harness.Submit(4, 10);
  const StepPlan plan = *harness.NextPlan();
  EXPECT_THAT(plan.slot_release, IsEmpty());
  EXPECT_THAT(RowLengths(plan), ElementsAre(4));
}

TEST(Scheduler, ChoicesOfARequestAreSequencesWithTheirOwnIndexAndCancelAlone) {
  Harness harness({});
  const uint64_t id = harness.Submit(3, 10, /*num_choices=*/2);
  harness.Finish(*harness.NextPlan());
  const StepPlan second = *harness.NextPlan();
  ASSERT_EQ(second.slot_init.size(), 1u);
  EXPECT_EQ(second.slot_init[0].sampling.choice_index, 1u);
  EXPECT_THAT(RowLengths(second), ElementsAre(1, 3));
  harness.Finish(second);
  harness.scheduler().Cancel({id, 0});
  const StepPlan third = *harness.NextPlan();
  EXPECT_THAT(RowLengths(third), ElementsAre(1));
  const auto tokens = harness.Finish(third);
  ASSERT_EQ(tokens.size(), 1u);
  EXPECT_EQ(tokens[0].sequence.choice, 1u);
}

TEST(Scheduler, RefusesAResultThatDoesNotFitThePlan) {
  struct Case {
    uint64_t step;
    std::vector<SampledToken> sampled;
    const char* error;
  };
  const Case cases[] = {
      {2, {{0, 5}}, "step 2 is reported done, in flight is 1"},
      {1, {}, "step 1 sampled 0 tokens, its plan asks for 1"},
      {1, {{3, 5}}, "sampled token 5 in slot 3, expected one below 1000 in slot 0"},
      {1, {{0, 1000}}, "sampled token 1000 in slot 0, expected one below 1000 in slot 0"},
  };
  for (const Case& bad : cases) {
    Harness harness({});
    harness.Submit(3, 5);
    ASSERT_TRUE(harness.NextPlan().has_value());
    const absl::Status status = harness.scheduler().OnStepDone(bad.step, bad.sampled).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(status.message()), HasSubstr(bad.error));
  }
}

}  // namespace
}  // namespace wintserve
