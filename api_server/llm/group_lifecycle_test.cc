#include "api_server/llm/group_lifecycle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "api_server/llm/group_lifecycle_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

TEST(GroupLifecycle, TheFirstStartGoesFromHelloToUse) {
  Group group;
  EXPECT_EQ(group->WaitingFor(), "waiting for engine workers: 0 of 2 connected");
  EXPECT_EQ(group->epoch(), 0u);
  group.Hello(1);
  EXPECT_THAT(group.Actions(), IsEmpty());
  EXPECT_EQ(group->WaitingFor(), "waiting for engine workers: 1 of 2 connected");
  group.Hello(0);
  EXPECT_THAT(group.Actions(), ElementsAre("configure"));
  EXPECT_EQ(group->epoch(), 101u);
  EXPECT_EQ(group->WaitingFor(), "");
  group->SetPool(kPool);
  EXPECT_THAT(group.Actions(), ElementsAre("attach"));
  EXPECT_EQ(group->WaitingFor(), "engine worker 0 is warming up");
  EXPECT_TRUE(group.Ready(0));
  EXPECT_THAT(group.Actions(), IsEmpty());
  EXPECT_EQ(group->WaitingFor(), "engine worker 1 is warming up");
  EXPECT_TRUE(group.Ready(1));
  EXPECT_THAT(group.Actions(), ElementsAre("use"));
  EXPECT_TRUE(group->in_use());
  EXPECT_FALSE(group->fault_time_us().has_value());
  EXPECT_FALSE(group->NextDeadlineUs().has_value());
}

TEST(GroupLifecycle, SaysThatAReplacementCouldNotStart) {
  Group group;
  group.Use();
  EXPECT_TRUE(group.Exit(1));
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted"));
  for (int i = 0; i < 2; ++i) {
    EXPECT_FALSE(group->OnExit(1, 4711 + i, true, "exited with code 66", group.now_us()));
    EXPECT_EQ(group->WaitingFor(),
              "waiting for engine workers: 1 of 2 connected; another engine worker 1 exited with "
              "code 66");
  }
  EXPECT_THAT(group.Actions(), IsEmpty());
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("configure", "attach"));
  EXPECT_EQ(group->WaitingFor(), "engine worker 0 is warming up");
}

TEST(GroupLifecycle, AKilledRankIsReplacedAndTheOtherStays) {
  Group group;
  group.Use();
  EXPECT_TRUE(group.Exit(1));
  EXPECT_EQ(group->fault(), "engine worker 1 was ended by signal 9");
  EXPECT_EQ(group->fault_cause(), FaultCause::kExit);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_EQ(group->WaitingFor(), "waiting for engine workers to leave their group: 1 of 2 have");
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted"));
  EXPECT_EQ(group->WaitingFor(), "waiting for engine workers: 1 of 2 connected");
  group.Drop(1);  // the stream of the dead one, at last
  EXPECT_THAT(group.Actions(), IsEmpty());
  const int64_t fault_us = group.now_us();
  EXPECT_THAT(group.ActionsAfter(kSecond), IsEmpty());
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("configure", "attach"));
  EXPECT_EQ(group->epoch(), 102u);
  EXPECT_EQ(group->fault_time_us(), fault_us);
  EXPECT_TRUE(group.Ready(1));
  EXPECT_TRUE(group.Ready(0));
  EXPECT_THAT(group.Actions(), ElementsAre("use"));
  EXPECT_FALSE(group->fault_time_us().has_value());
}

// A broken stream says nothing about what still writes; the reaped process does.
TEST(GroupLifecycle, ARankWhoseStreamBrokeIsNotFencedBeforeItIsReaped) {
  Group group;
  group.Use();
  group.Drop(1);
  EXPECT_EQ(group->fault_cause(), FaultCause::kStream);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_THAT(group.ActionsAfter(4 * kSecond), IsEmpty());
  EXPECT_TRUE(group.Exit(1));
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted"));
}

TEST(GroupLifecycle, ARankThatDoesNotLeaveIsEndedAfterFiveSeconds) {
  Group group;
  group.Use();
  group.Exit(0);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 1"));
  EXPECT_EQ(group->NextDeadlineUs(), group.now_us() + 5 * kSecond);
  EXPECT_THAT(group.ActionsAfter(5 * kSecond - 1), IsEmpty());
  EXPECT_THAT(group.ActionsAfter(1), ElementsAre("end 1 11"));
  EXPECT_THAT(group.ActionsAfter(5 * kSecond), ElementsAre("end 1 11"));
  EXPECT_TRUE(group.Exit(1));
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted"));
  group.Hello(0);
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("configure", "attach"));
}

TEST(GroupLifecycle, AWorkerThatComesBackAfterItsStreamBrokeHasLeftItsGroup) {
  Group group;
  group.Use();
  group.Drop(1);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  group.SameHello(1);
  EXPECT_THAT(group.Actions(), IsEmpty());  // it is not told to leave a group that it has left
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted", "configure", "attach"));
}

// The two ways by which the news come are not ordered.
TEST(GroupLifecycle, AReplacementThatAttachesBeforeTheNoticeOfTheExitWaitsForIt) {
  Group group;
  group.Use();
  group.Drop(1);
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_THAT(group.ActionsAfter(kSecond - 1), IsEmpty());
  EXPECT_TRUE(group->OnExit(1, 11, /*kv_trusted=*/true, "was ended by signal 9", group.now_us()));
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted", "configure", "attach"));
}

TEST(GroupLifecycle, AReplacementWhosePredecessorsEndIsNeverToldMakesTheKvWrong) {
  Group group;
  group.Use();
  group.Drop(1);
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_EQ(group->NextDeadlineUs(), group.now_us() + kSecond);
  EXPECT_THAT(group.ActionsAfter(kSecond), ElementsAre("lose wrong", "configure", "attach"));
}

// A survivor that has left its group and then crashes was perhaps wrong before, too.
TEST(GroupLifecycle, ASurvivorThatCrashesAfterTheGroupIsLostMakesItsKvWrong) {
  Group group;
  group.Use();
  group.Exit(1);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted"));
  EXPECT_TRUE(group.Exit(0, /*kv_trusted=*/false));
  EXPECT_THAT(group.Actions(), ElementsAre("distrust"));
  group.Hello(1);
  EXPECT_TRUE(group.Exit(1, /*kv_trusted=*/false));  // was in no group yet
  EXPECT_THAT(group.Actions(), IsEmpty());
  group.Hello(0);
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("configure", "attach"));
}

TEST(GroupLifecycle, TheNoticeOfASurvivorsExitIsWaitedForAfterTheGroupIsLost) {
  Group group;
  group.Use();
  group.Exit(1);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_TRUE(group.Aborted(0));
  group.Drop(0);
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted"));
  group.Hello(1);
  group.Hello(0);
  EXPECT_THAT(group.Actions(), IsEmpty());
  EXPECT_EQ(group->WaitingFor(), "waiting to hear how an engine worker has ended");
  EXPECT_THAT(group.ActionsAfter(kSecond - 1), IsEmpty());
  EXPECT_TRUE(group->OnExit(0, 10, /*kv_trusted=*/false, "was ended by signal 11", group.now_us()));
  EXPECT_THAT(group.Actions(), ElementsAre("distrust", "configure", "attach"));
}

// Only the process that was in the group has a verdict to wait for.
TEST(GroupLifecycle, TheVerdictOnAProcessOutlivesItsFirstReplacement) {
  Group group;
  group.Use();
  group.Drop(1);
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  group.Drop(1);
  group.Hello(1);
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_TRUE(group->OnExit(1, 11, /*kv_trusted=*/false, "was ended by signal 11", group.now_us()));
  EXPECT_FALSE(group->OnExit(1, 21, /*kv_trusted=*/true, "was ended by signal 9", group.now_us()));
  EXPECT_THAT(group.Actions(), ElementsAre("lose wrong", "configure", "attach"));
}

TEST(GroupLifecycle, WithoutALauncherABrokenStreamFencesAfterAGraceAndTheKvIsWrong) {
  Group group;
  group.Use();
  group->OnWatching(false, group.now_us());
  group.Drop(1);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_THAT(group.ActionsAfter(2 * kSecond - 1), IsEmpty());
  EXPECT_FALSE(group->gone(1));
  EXPECT_THAT(group.ActionsAfter(1), ElementsAre("lose wrong"));
  EXPECT_TRUE(group->gone(1));
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("configure", "attach"));
}

TEST(GroupLifecycle, TheGraceBeginsWhenTheLauncherIsOutOfReach) {
  Group group;
  group.Use();
  group.Drop(1);
  EXPECT_THAT(group.ActionsAfter(3 * kSecond), ElementsAre("abort 0"));
  EXPECT_TRUE(group.Aborted(0));
  group->OnWatching(false, group.now_us());
  EXPECT_THAT(group.ActionsAfter(kSecond), IsEmpty());
  EXPECT_THAT(group.ActionsAfter(kSecond), ElementsAre("lose wrong"));
}

TEST(GroupLifecycle, ARankThatHangsBeforeThereIsAGroupIsEnded) {
  Group group;
  group.Hello(0);
  group.Drop(0);
  EXPECT_THAT(group.ActionsAfter(5 * kSecond), ElementsAre("end 0 10"));
  EXPECT_TRUE(group.Exit(0, /*kv_trusted=*/false));
  group.Hello(0);
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("configure"));
}

TEST(GroupLifecycle, APoolThatGoesIsNoFault) {
  Group group;
  group.Use();
  group->SetPool(0);
  EXPECT_THAT(group.Actions(), IsEmpty());
  EXPECT_FALSE(group->in_use());
  EXPECT_TRUE(group->has_group());
  EXPECT_FALSE(group->fault_time_us().has_value());
  group->SetPool(kPool);
  group.UseAgain();
  EXPECT_EQ(group->epoch(), 101u);
  // While they attach, too; what a rank says of the old one is late.
  group->SetPool(kPool + 1);
  EXPECT_THAT(group.Actions(), ElementsAre("attach"));
  EXPECT_TRUE(group->OnReady(0, group->epoch(), kPool + 1));
  group->SetPool(0);
  EXPECT_FALSE(group->OnReady(1, group->epoch(), kPool + 1));
  group->SetPool(kPool);
  group.UseAgain();
}

TEST(GroupLifecycle, MessagesOfAnotherEpochAreStale) {
  Group group;
  group.Use();
  EXPECT_FALSE(group->OnAborted(0, group->epoch()));  // nobody asked
  group.Exit(1);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_FALSE(group->OnAborted(0, group->epoch() - 1));
  EXPECT_FALSE(group->OnAborted(1, group->epoch()));  // of the dead one
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_FALSE(group.Aborted(0));
  EXPECT_FALSE(group->OnReady(0, group->epoch(), kPool));
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted"));
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("configure", "attach"));
  EXPECT_FALSE(group->OnReady(0, group->epoch() - 1, kPool));
  EXPECT_TRUE(group.Ready(0));
  EXPECT_FALSE(group.Ready(0));
}

TEST(GroupLifecycle, ExitsOfStrangersAndOfReplacedProcessesChangeNothing) {
  Group group;
  group.Use();
  EXPECT_FALSE(group->OnExit(0, 99, false, "exited", group.now_us()));
  EXPECT_FALSE(group->OnExit(7, 10, false, "exited", group.now_us()));
  EXPECT_FALSE(group->OnExit(0, 0, false, "exited", group.now_us()));
  EXPECT_TRUE(group.Exit(1));
  EXPECT_FALSE(group.Exit(1));
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted"));
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("configure", "attach"));
  EXPECT_FALSE(group->OnExit(1, 11, false, "exited", group.now_us()));
  EXPECT_TRUE(group->has_group());
}

TEST(GroupLifecycle, WhateverGoesWrongWhileTheGroupLeavesCountsToo) {
  Group group;
  group.Use();
  group.Exit(1);
  EXPECT_THAT(group.Actions(), ElementsAre("abort 0"));
  EXPECT_TRUE(group.Aborted(0));
  EXPECT_TRUE(group.Exit(0, /*kv_trusted=*/false));
  EXPECT_THAT(group.Actions(), ElementsAre("lose wrong"));
  EXPECT_EQ(group->fault(), "engine worker 1 was ended by signal 9");
  group.Hello(0);
  group.Hello(1);
  EXPECT_THAT(group.Actions(), ElementsAre("configure", "attach"));
  group.Drop(0);
  EXPECT_TRUE(group.Exit(0));
  EXPECT_THAT(group.Actions(), ElementsAre("abort 1"));
  EXPECT_TRUE(group.Aborted(1));
  EXPECT_THAT(group.Actions(), ElementsAre("lose trusted"));  // the next one starts anew
}

}  // namespace
}  // namespace wintserve
