#include "api_server/scheduler/step_time_model.h"

#include <gtest/gtest.h>

namespace wintserve {
namespace {

StepTimeModel Measured() {
  StepTimeModel model(16, 0);
  model.Add({.num_decodes = 4}, 1000);
  model.Add({.num_decodes = 8}, 2000);
  model.Add({.num_decodes = 4, .num_prefill_tokens = 100}, 1000 + 100 * 10);
  return model;
}

TEST(StepTimeModel, KnowsNothingBeforeBothKindsOfStepsWereMeasured) {
  StepTimeModel model(16, 0);
  EXPECT_LT(model.PrefillTokensWithin(3, 4), 0);
  model.Add({.num_decodes = 4}, 1000);
  EXPECT_LT(model.PrefillTokensWithin(3, 4), 0);
  model.Add({.num_prefill_tokens = 100}, 1000);
  EXPECT_DOUBLE_EQ(model.PrefillTokensWithin(3, 4), 2 * 1000 / 10.0);
}

TEST(StepTimeModel, InterpolatesBetweenMeasuredNumbersOfDecodes) {
  struct Case {
    const char* name;
    int num_decodes;
    double decode_us;
  };
  const StepTimeModel model = Measured();
  for (const Case& c :
       {Case{"measured", 4, 1000}, Case{"between", 6, 1500}, Case{"below: in proportion", 2, 500},
        Case{"above: the nearest", 12, 2000}}) {
    EXPECT_DOUBLE_EQ(model.PrefillTokensWithin(3, c.num_decodes), 2 * c.decode_us / 10) << c.name;
  }
}

TEST(StepTimeModel, AnOutlierMovesItLittleAndALastingChangeIsFollowed) {
  StepTimeModel model = Measured();
  model.Add({.num_decodes = 4}, 1'000'000);
  // Counted as twice the estimate, with a fifth of the weight.
  EXPECT_DOUBLE_EQ(model.PrefillTokensWithin(2, 4), 1200 / 10.0);
  for (int i = 0; i < 60; ++i) model.Add({.num_decodes = 4}, 5000);
  EXPECT_NEAR(model.PrefillTokensWithin(2, 4), 5000 / 10.0, 5);
}

TEST(StepTimeModel, RestoresWhatIsCopiedFasterThanComputed) {
  StepTimeModel model(16, /*restore_us_per_block=*/700);
  EXPECT_TRUE(model.RestoreIsWorthwhile(64));  // nothing is known
  model.Add({.num_prefill_tokens = 100}, 1000);
  EXPECT_FALSE(model.RestoreIsWorthwhile(64));  // 640 us to compute
  for (int i = 0; i < 20; ++i) model.Add({.num_copies = 10}, 1000);
  EXPECT_TRUE(model.RestoreIsWorthwhile(64));
}

// One slow copy, as of a step that waited for something else, must not end restores for good.
TEST(StepTimeModel, TriesRestoresAgainThatWereSlowOnce) {
  StepTimeModel model(16, /*restore_us_per_block=*/0);
  model.Add({.num_prefill_tokens = 100}, 1000);
  model.Add({.num_copies = 1}, 1280);
  int refusals = 0;
  while (!model.RestoreIsWorthwhile(64)) ++refusals;
  EXPECT_EQ(refusals, 14);
  model.Add({.num_copies = 1}, 100);
  EXPECT_TRUE(model.RestoreIsWorthwhile(64));
}

}  // namespace
}  // namespace wintserve
