// The queue: its order, its limits, what it predicts, and deadlines.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(Queue, ALowerPriorityValueGoesFirstAndATenantAtItsCapIsPassedOver) {
  FakeWorld world({.max_num_seqs = 2, .async_depth = 0, .max_seqs_per_tenant = 1});
  const auto submit = [&](uint64_t id, int priority, const char* tenant) {
    ASSERT_TRUE(world
                    .Submit({.id = id,
                             .prompt_ids = Prompt(5),
                             .max_tokens = 3,
                             .ignore_eos = true,
                             .priority = priority,
                             .tenant = tenant})
                    .ok());
  };
  submit(1, 1, "a");
  submit(2, 0, "b");
  submit(3, 0, "b");
  world.Settle();
  EXPECT_EQ(world.started().size(), 2u);
  EXPECT_TRUE(world.started().contains({1, 0}));
  EXPECT_TRUE(world.started().contains({2, 0}));
  world.RunToEnd();
  EXPECT_EQ(world.started().size(), 3u);
}

TEST(Queue, ATenantThatHasLeftLeavesNothingBehindAndIsCappedWhenItComesBack) {
  FakeWorld world({.max_num_seqs = 4, .async_depth = 0, .max_seqs_per_tenant = 1});
  const auto submit = [&](uint64_t id) {
    ASSERT_TRUE(world
                    .Submit({.id = id,
                             .prompt_ids = Prompt(5),
                             .num_choices = 2,
                             .max_tokens = 3,
                             .ignore_eos = true,
                             .tenant = "a"})
                    .ok());
  };
  submit(1);
  world.Settle();
  world.Cancel(1);
  world.RunToEnd();  // checks after every event that no tenant is without a request
  submit(2);
  world.Settle();
  EXPECT_EQ(world.scheduler().stats().num_running, 1);
  world.RunToEnd();
  EXPECT_EQ(world.scheduler().stats().num_waiting, 0);
}

TEST(Queue, ATenantAtItsCapKeepsTheOrderOfItsOwnSequences) {
  FakeWorld world({.max_num_seqs = 4, .async_depth = 0, .max_seqs_per_tenant = 1});
  const std::pair<int, const char*> requests[] = {{1, "a"}, {0, "a"}, {1, "a"}, {1, "b"}};
  uint64_t id = 0;
  for (const auto& [priority, tenant] : requests) {
    ASSERT_TRUE(world
                    .Submit({.id = ++id,
                             .prompt_ids = Prompt(5),
                             .max_tokens = 3,
                             .ignore_eos = true,
                             .priority = priority,
                             .tenant = tenant})
                    .ok());
  }
  std::vector<uint64_t> order;
  for (int i = 0; i < 100 && order.size() < 4; ++i) {
    world.Settle();
    for (const auto& [key, num_cached] : world.started()) {
      if (std::find(order.begin(), order.end(), key.request) == order.end()) {
        order.push_back(key.request);
      }
    }
    if (!world.plans().empty()) world.FinishPlan();
  }
  EXPECT_THAT(order, ElementsAre(2, 4, 1, 3));
}

// What keeps one sequence of a tenant back takes no room of the tenant's.
TEST(Queue, AShortPromptPassesALongOneOfItsTenant) {
  FakeWorld world({.max_num_batched_tokens = 32,
                   .async_depth = 0,
                   .prefix_caching = false,
                   .max_long_partial_prefills = 1,
                   .long_prefill_token_threshold = 16,
                   .max_seqs_per_tenant = 2});
  uint64_t id = 0;
  for (const int prompt_len : {100, 100, 100, 10}) {
    ASSERT_TRUE(
        world.Submit({.id = ++id, .prompt_ids = Prompt(prompt_len), .max_tokens = 5, .tenant = "a"})
            .ok());
  }
  EXPECT_THAT(RowLengths(NextPlan(&world)), ElementsAre(16, 10));
  EXPECT_TRUE(world.started().contains({4, 0}));
}

TEST(Queue, AnotherRequestOfATenantRunsWhileChoicesWaitForTheirFirst) {
  FakeWorld world({.async_depth = 0, .max_seqs_per_tenant = 2});
  for (uint64_t id = 1; id <= 2; ++id) {
    ASSERT_TRUE(world
                    .Submit({.id = id,
                             .prompt_ids = Prompt(130, static_cast<int>(1000 * id)),
                             .num_choices = 3,
                             .max_tokens = 5,
                             .tenant = "a"})
                    .ok());
  }
  NextPlan(&world);
  EXPECT_TRUE(world.started().contains({1, 0}));
  EXPECT_TRUE(world.started().contains({2, 0}));
  EXPECT_EQ(world.scheduler().stats().num_running, 2);
  world.RunToEnd();
  world.ExpectAllTokens();
}

TEST(Queue, IsBoundedBySequencesAndTokensAndSaysWhenToComeAgain) {
  FakeWorld world({.max_num_seqs = 1, .max_queue_requests = 2, .max_queue_tokens = 100});
  for (int i = 0; i < 2; ++i) world.Submit(10, 5);
  const absl::Status requests = world.Submit({.id = 9, .prompt_ids = Prompt(3), .max_tokens = 1});
  EXPECT_EQ(requests.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(requests.message(), "the queue is full: 2 sequences wait, 1 more would exceed 2");
  EXPECT_EQ(RetryAfterSeconds(requests), 1);
  world.Cancel(2);
  const absl::Status tokens = world.Submit({.id = 9, .prompt_ids = Prompt(91), .max_tokens = 1});
  EXPECT_EQ(tokens.message(),
            "the queue is full: 10 prompt tokens wait to be computed, 91 more would exceed 100");
  EXPECT_TRUE(world.Submit({.id = 9, .prompt_ids = Prompt(90), .max_tokens = 1}).ok());
}

TEST(Queue, TokensCountForEachChoiceThatComputesThePrompt) {
  struct Case {
    const char* name;
    bool prefix_caching;
    bool bypass_cache_match;
    bool cache_is_lost;
    int prompt_len;
    int64_t num_tokens;  // of 3 choices
  };
  for (const Case& c : {Case{"they share its full blocks", true, false, false, 130, 130 + 2 + 2},
                        Case{"but never its last token", true, false, false, 128, 128 + 64 + 64},
                        Case{"no full block", true, false, false, 64, 3 * 64},
                        Case{"caching off", false, false, false, 130, 3 * 130},
                        Case{"no match wanted", true, true, false, 130, 3 * 130},
                        Case{"no session", true, false, true, 130, 3 * 130}}) {
    SCOPED_TRACE(c.name);
    for (const int64_t excess : {0, 1}) {
      const int64_t limit = 10 + c.num_tokens - excess;
      FakeWorld world({.prefix_caching = c.prefix_caching, .max_queue_tokens = limit});
      if (c.cache_is_lost) world.LoseCache();
      world.Submit(10, 5);
      const absl::Status status = world.Submit({.id = 9,
                                                .prompt_ids = Prompt(c.prompt_len),
                                                .num_choices = 3,
                                                .max_tokens = 1,
                                                .bypass_cache_match = c.bypass_cache_match});
      if (excess == 0) {
        EXPECT_TRUE(status.ok()) << status;
        EXPECT_EQ(world.scheduler().stats().num_waiting_tokens, limit);
      } else {
        EXPECT_EQ(status.message(),
                  fmt::format("the queue is full: 10 prompt tokens wait to be computed, {} more "
                              "would exceed {}",
                              c.num_tokens, limit));
        EXPECT_EQ(world.scheduler().stats().num_waiting_tokens, 10);
      }
    }
  }
}

TEST(Queue, TheTimeToComeAgainGrowsWhileTheQueueStandsStillUpToTenMinutes) {
  FakeWorld world({.max_num_seqs = 1, .async_depth = 0, .max_queue_requests = 3});
  const auto retry_after_seconds = [&] {
    const absl::Status status = world.Submit({.id = 99, .prompt_ids = Prompt(3), .max_tokens = 1});
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    return RetryAfterSeconds(status);
  };
  for (const bool has_moved : {false, true}) {
    SCOPED_TRACE(has_moved ? "it has moved before" : "nothing has ever left it");
    while (world.scheduler().stats().num_waiting < 3) world.Submit(3, 1);
    for (int i = 0; i < 60 && has_moved; ++i) {  // one a second
      NextPlan(&world);
      world.FinishPlan(1'000'000);
      world.Submit(3, 1);
    }
    const int64_t since_us = world.now_us;
    EXPECT_LE(retry_after_seconds(), 2);
    for (const int still_seconds : {5, 30, 100, 400, 599}) {
      world.now_us = since_us + int64_t{1'000'000} * still_seconds;
      EXPECT_GE(retry_after_seconds(), still_seconds);
      EXPECT_LE(retry_after_seconds(), 2 * still_seconds);
    }
    world.now_us = since_us + int64_t{86'400} * 1'000'000;
    EXPECT_EQ(retry_after_seconds(), 600);
  }
}

TEST(Queue, AWaitThatIsPredictedToOutlastTheDeadlineIsRefused) {
  FakeWorld world({.max_num_seqs = 1, .async_depth = 0});
  for (int i = 0; i < 20; ++i) world.Submit(3, 1);
  for (int i = 0; i < 4; ++i) {  // one a second
    NextPlan(&world);
    world.FinishPlan(1'000'000);
  }
  const absl::Status status = world.Submit({.id = 99,
                                            .prompt_ids = Prompt(3),
                                            .max_tokens = 1,
                                            .deadline_us = world.now_us + 2'000'000,
                                            .timeout_ms = 2'000});
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("longer than the timeout of 2 s"));
  EXPECT_GT(RetryAfterSeconds(status), 5);
}

TEST(Queue, SequencesOfAnotherTenantAtItsCapAreNotPartOfThePredictedWait) {
  FakeWorld world({.max_num_seqs = 3, .async_depth = 0, .max_seqs_per_tenant = 1});
  uint64_t id = 0;
  const auto submit = [&](const char* tenant, std::optional<int64_t> deadline_us) {
    return world.Submit({.id = ++id,
                         .prompt_ids = Prompt(3),
                         .max_tokens = 3,
                         .ignore_eos = true,
                         .tenant = tenant,
                         .deadline_us = deadline_us});
  };
  for (int i = 0; i < 50; ++i) ASSERT_TRUE(submit("a", std::nullopt).ok());
  for (int i = 0; i < 20; ++i) {  // one in two seconds
    NextPlan(&world);
    world.FinishPlan(1'000'000);
  }
  ASSERT_EQ(world.scheduler().stats().num_waiting, 40);
  const int64_t deadline_us = world.now_us + 5'000'000;
  const absl::Status own = submit("a", deadline_us);
  EXPECT_EQ(own.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GE(RetryAfterSeconds(own), 60);
  for (const char* tenant : {"b", ""}) {
    const absl::Status others = submit(tenant, deadline_us);
    EXPECT_TRUE(others.ok()) << others;
  }
  NextPlan(&world);
  EXPECT_TRUE(world.started().contains({id - 1, 0}));  // there is a slot for it
}

TEST(Queue, NamesTheTimeoutAsTheClientGaveItHoweverLateTheSchedulerHearsOfIt) {
  constexpr struct {
    int64_t timeout_ms;
    int64_t left_us;
    const char* text;
  } kRows[] = {{1, -40, "0.001"},   {50, 40'000, "0.05"}, {300, 299'919, "0.3"},
               {500, 1'700, "0.5"}, {1'500, 900, "1.5"},  {60'000, 59'999'919, "60"}};
  for (const auto& row : kRows) {
    FakeWorld world({.max_num_seqs = 1, .async_depth = 0});
    const int64_t deadline_us = world.now_us + row.left_us;
    ASSERT_TRUE(world
                    .Submit({.id = 1,
                             .prompt_ids = Prompt(3),
                             .max_tokens = 9,
                             .deadline_us = deadline_us,
                             .timeout_ms = row.timeout_ms})
                    .ok());
    world.now_us = std::max(world.now_us, deadline_us);
    world.RunToEnd();
    EXPECT_EQ(world.failed().at({1, 0}).message(),
              fmt::format("the timeout of {} s is over, after 0 of at most 9 tokens", row.text));
  }
}

TEST(Queue, ADeadlineEndsAWaitingAndARunningSequenceAndNamesTheTimeout) {
  FakeWorld world({.max_num_seqs = 1, .async_depth = 0});
  for (uint64_t id = 1; id <= 2; ++id) {
    ASSERT_TRUE(world
                    .Submit({.id = id,
                             .prompt_ids = Prompt(3),
                             .max_tokens = 100,
                             .ignore_eos = true,
                             .deadline_us = 2'500'000,
                             .timeout_ms = 2'500})
                    .ok());
  }
  EXPECT_EQ(world.scheduler().NextDeadlineUs(), 2'500'000);
  world.Settle();
  world.FinishPlan();
  world.now_us = 2'500'000;
  world.RunToEnd();
  EXPECT_EQ(
      world.failed().at({1, 0}),
      absl::DeadlineExceededError("the timeout of 2.5 s is over, after 1 of at most 100 tokens"));
  EXPECT_EQ(
      world.failed().at({2, 0}),
      absl::DeadlineExceededError("the timeout of 2.5 s is over, after 0 of at most 100 tokens"));
  EXPECT_EQ(world.scheduler().NextDeadlineUs(), std::nullopt);
  world.ExpectAllBlocksBack();
}

}  // namespace
}  // namespace wintserve
