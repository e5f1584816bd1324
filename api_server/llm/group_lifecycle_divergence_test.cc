// Ranks that disagree again and again.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "api_server/llm/group_lifecycle_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// Damaged weights stay damaged in a rank that leaves its group and joins the next one.
TEST(GroupLifecycle, RanksThatDisagreeAgainWithinTenMinutesAreReplaced) {
  Group group;
  group.Use();
  group.Fault(/*kv_trusted=*/false);
  EXPECT_FALSE(group->at_fault());
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0", "abort 1"));
  EXPECT_TRUE(group.Aborted(0) && group.Aborted(1));
  EXPECT_THAT(group.Actions(), ElementsAre("lose wrong", "configure", "attach"));
  EXPECT_TRUE(group.Ready(0) && group.Ready(1));
  EXPECT_THAT(group.ActionsAfter(600 * kSecond - 1), ElementsAre("use"));
  group.Fault(/*kv_trusted=*/false);
  EXPECT_TRUE(group->at_fault());
  EXPECT_THAT(group->fault(), HasSubstr("every engine worker is replaced"));
  EXPECT_THAT(group.Actions(), ElementsAre("end 0 10", "end 1 11"));
  // Leaving is not enough, nor is coming back.
  EXPECT_TRUE(group.Exit(0, /*kv_trusted=*/false));
  group.Hello(0);
  group.Drop(1);
  group.SameHello(1);
  EXPECT_THAT(group.Actions(), IsEmpty());
  EXPECT_THAT(group.ActionsAfter(5 * kSecond), ElementsAre("end 1 11"));
  EXPECT_TRUE(group.Exit(1, /*kv_trusted=*/false));
  EXPECT_THAT(group.Actions(), ElementsAre("lose wrong"));
  EXPECT_FALSE(group->at_fault());
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("configure", "attach"));
}

TEST(GroupLifecycle, RanksThatDisagreeOnceInALongWhileLeaveTheirGroupEachTime) {
  Group group;
  group.Use();
  for (int i = 0; i < 3; ++i) {
    group.Fault(/*kv_trusted=*/false);
    EXPECT_THAT(group.Actions(), ElementsAre("abort 0", "abort 1"));
    EXPECT_TRUE(group.Aborted(0) && group.Aborted(1));
    EXPECT_THAT(group.Actions(), ElementsAre("lose wrong", "configure", "attach"));
    EXPECT_TRUE(group.Ready(0) && group.Ready(1));
    EXPECT_THAT(group.ActionsAfter(600 * kSecond), ElementsAre("use"));
  }
}

// Nobody would end them.
TEST(GroupLifecycle, WithoutALauncherRanksThatDisagreeAgainLeaveTheirGroup) {
  for (const bool gone_before : {true, false}) {
    Group group;
    group.Use();
    group.Fault(/*kv_trusted=*/false);
    EXPECT_THAT(group.Actions(), ElementsAre("abort 0", "abort 1"));
    EXPECT_TRUE(group.Aborted(0) && group.Aborted(1));
    EXPECT_THAT(group.Actions(), ElementsAre("lose wrong", "configure", "attach"));
    EXPECT_TRUE(group.Ready(0) && group.Ready(1));
    EXPECT_THAT(group.Actions(), ElementsAre("use"));
    if (gone_before) group->OnWatching(false, group.now_us());
    group.Fault(/*kv_trusted=*/false);
    if (!gone_before) {
      EXPECT_THAT(group.Actions(), ElementsAre("end 0 10", "end 1 11"));
      group->OnWatching(false, group.now_us());
    }
    EXPECT_THAT(group.Actions(), ElementsAre("abort 0", "abort 1"));
    EXPECT_TRUE(group.Aborted(0) && group.Aborted(1));
    EXPECT_THAT(group.Actions(), ElementsAre("lose wrong", "configure", "attach"));
  }
}

}  // namespace
}  // namespace wintserve
