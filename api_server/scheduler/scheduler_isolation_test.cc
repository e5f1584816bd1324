// Requests that run alone, as they may be the cause of what happens to the rank group.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

TEST(Isolation, ARequestRunsAloneWhateverItsPlaceAndTheOthersAfterIt) {
  FakeWorld world({.max_num_seqs = 2,
                   .block_size_tokens = 4,
                   .num_blocks = 10,
                   .async_depth = 1,
                   .max_seqs_per_tenant = 1});
  for (uint64_t id = 1; id <= 4; ++id) {
    const absl::Status status = world.Submit({.id = id,
                                              .prompt_ids = Prompt(12, static_cast<int>(100 * id)),
                                              .sampling = {.seed = static_cast<int64_t>(id)},
                                              .num_choices = id == 4 ? 2 : 1,
                                              .max_tokens = 8,
                                              .ignore_eos = true,
                                              .tenant = id % 2 == 0 ? "a" : ""});
    ASSERT_TRUE(status.ok()) << status;
  }
  world.Settle();
  world.FinishPlan();
  world.Settle();
  EXPECT_EQ(world.scheduler().stats().num_running, 2);
  world.scheduler().SetIsolated(4);  // last in line, parked, and no slot is free
  EXPECT_EQ(world.scheduler().isolated(), 4u);
  EXPECT_EQ(world.scheduler().stats().num_running, 0);
  while (!world.ended({4, 0}) || !world.ended({4, 1})) {
    ASSERT_FALSE(testing::Test::HasFailure());
    world.Settle();  // checks that nobody else has a row
    world.FinishPlan();
  }
  EXPECT_EQ(world.scheduler().isolated(), std::nullopt);
  for (uint64_t id = 1; id <= 3; ++id) EXPECT_FALSE(world.ended({id, 0}));
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Isolation, ALastRowOfAnotherRequestThatIsLostHasToWait) {
  FakeWorld world({.max_num_seqs = 2, .async_depth = 1});
  world.Submit(10, 2);
  world.Settle();
  world.Submit(20, 5);
  world.scheduler().SetIsolated(2);  // the last row of 1 is in flight
  world.LoseGroup();
  EXPECT_EQ(world.scheduler().stats().num_running, 0);
  while (!world.ended({2, 0})) {
    ASSERT_FALSE(testing::Test::HasFailure());
    world.Settle();
    world.FinishPlan();
  }
  EXPECT_THAT(world.tokens(1), IsEmpty());
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Isolation, EndsWithItsRequestOrWhenToldAndLastsOverGroupLosses) {
  FakeWorld world({.max_num_seqs = 2, .async_depth = 1});
  world.Submit(10, 8);
  world.Submit(10, 8);
  world.Settle();
  world.LoseGroup(/*first_bad_step=*/1);
  world.scheduler().SetIsolated(2);
  world.Settle();
  EXPECT_THAT(world.scheduler().RequestsInFlight(), ElementsAre(2u));
  world.LoseGroup(/*first_bad_step=*/1);
  world.Settle();
  EXPECT_THAT(world.scheduler().RequestsInFlight(), ElementsAre(2u));
  world.scheduler().SetIsolated(std::nullopt);
  world.FinishPlan();
  world.Settle();
  EXPECT_THAT(world.scheduler().RequestsInFlight(), ElementsAre(1u, 2u));
  world.LoseGroup(/*first_bad_step=*/1);
  world.scheduler().SetIsolated(2);
  world.Cancel(2);
  EXPECT_EQ(world.scheduler().isolated(), std::nullopt);
  world.scheduler().SetIsolated(2);  // it is not known any more, so nobody is held up
  EXPECT_EQ(world.scheduler().isolated(), std::nullopt);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

}  // namespace
}  // namespace wintserve
