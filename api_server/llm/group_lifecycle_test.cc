#include "api_server/llm/group_lifecycle.h"

#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "api_server/llm/group_lifecycle_test_util.h"

namespace wintserve {
namespace {

using Action = GroupLifecycle::Action;
using testing::ElementsAre;
using testing::HasSubstr;
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

// Every fault in every state: it must always end in a group in use again, by these actions.
enum class When {
  kEmpty,
  kGathering,
  kConfigured,
  kAttaching,
  kHalfReady,
  kInUse,
  kAborting,
  kHalfAborted
};
enum class What { kExitTrusted, kExitWrong, kDrop, kDropThenBack, kReported, kDivergence, kHang };

constexpr const char* kWhen[] = {"Empty",     "Gathering", "Configured", "Attaching",
                                 "HalfReady", "InUse",     "Aborting",   "HalfAborted"};
constexpr const char* kWhat[] = {"ExitTrusted", "ExitWrong",  "Drop", "DropThenBack",
                                 "Reported",    "Divergence", "Hang"};

class EveryFault : public testing::TestWithParam<std::tuple<int, int, int>> {};

TEST_P(EveryFault, EndsInAGroupInUse) {
  const auto when = static_cast<When>(std::get<0>(GetParam()));
  const auto what = static_cast<What>(std::get<1>(GetParam()));
  const auto rank = static_cast<uint32_t>(std::get<2>(GetParam()));
  const uint32_t other = 1 - rank;
  Group group;
  switch (when) {
    case When::kEmpty:
      break;
    case When::kGathering:
      group.Hello(rank);
      break;
    case When::kConfigured:
      group.Gather();
      break;
    case When::kAttaching:
      group.Attach();
      break;
    case When::kHalfReady:
      group.Attach();
      EXPECT_TRUE(group.Ready(rank));
      break;
    case When::kInUse:
      group.Use();
      break;
    case When::kAborting:
      group.Use();
      group.Fault(/*kv_trusted=*/true);
      EXPECT_THAT(group.Actions(), ElementsAre("abort 0", "abort 1"));
      break;
    case When::kHalfAborted:
      group.Use();
      group.Fault(/*kv_trusted=*/true);
      EXPECT_THAT(group.Actions(), ElementsAre("abort 0", "abort 1"));
      EXPECT_TRUE(group.Aborted(rank));
      break;
  }
  group->SetPool(kPool);
  const bool had_group = when >= When::kConfigured;
  const bool told_before = when >= When::kAborting;
  std::vector<std::string> seen;
  const auto look = [&](int64_t after_us = 0) {
    for (const std::string& action : group.ActionsAfter(after_us)) seen.push_back(action);
  };
  bool is_there = when != When::kEmpty;  // the rank's process
  bool wrong = false;
  switch (what) {
    case What::kExitTrusted:
    case What::kExitWrong:
      EXPECT_EQ(group.Exit(rank, what == What::kExitTrusted), is_there);
      wrong = what == What::kExitWrong;
      is_there = false;
      break;
    case What::kDrop:  // reaped a moment later
      group.Drop(rank);
      look();
      EXPECT_EQ(group.Exit(rank), is_there);
      is_there = false;
      break;
    case What::kDropThenBack:
      group.Drop(rank);
      look();
      if (is_there) group.SameHello(rank);
      break;
    case What::kReported:  // then it exits
      group->OnFault(FaultCause::kReported, false, "no memory", group.now_us());
      look();
      EXPECT_EQ(group.Exit(rank), is_there);
      is_there = false;
      wrong = true;
      break;
    case What::kDivergence:
      group.Fault(/*kv_trusted=*/false);
      wrong = true;
      break;
    case What::kHang:  // its stream breaks when the keepalive finds nobody
      look(3 * kSecond);
      group.Drop(rank);
      look(5 * kSecond);
      if (is_there) {
        EXPECT_THAT(seen, testing::Contains(fmt::format("end {} {}", rank, group.id(rank))));
        EXPECT_TRUE(group.Exit(rank));
      }
      is_there = false;
      break;
  }
  // The other one obeys, unless it was ended for being slow (which its patience allows for).
  look();
  const bool other_is_there = group->attached(other);
  if (had_group && other_is_there) group->OnAborted(other, group->epoch());
  if (had_group && group->attached(rank)) group->OnAborted(rank, group->epoch());
  look();
  if (!group->attached(rank)) group.Hello(rank);
  if (!group->attached(other)) group.Hello(other);
  look();
  EXPECT_TRUE(group.Ready(0)) << testing::PrintToString(seen);
  EXPECT_TRUE(group.Ready(1));
  look();
  EXPECT_TRUE(group->in_use());
  EXPECT_EQ(seen.back(), "use");
  // The group that there was is lost once, at its worth; each of its ranks is told at most once.
  const auto count = [&](const std::string& prefix) {
    return std::count_if(seen.begin(), seen.end(),
                         [&](const std::string& s) { return s.rfind(prefix, 0) == 0; });
  };
  EXPECT_EQ(count("lose"), had_group ? 1 : 0) << testing::PrintToString(seen);
  EXPECT_EQ(count(wrong ? "lose wrong" : "lose trusted"), had_group ? 1 : 0)
      << testing::PrintToString(seen);
  EXPECT_LE(count("abort 0"), told_before ? 0 : 1);
  EXPECT_LE(count("abort 1"), told_before ? 0 : 1);
  EXPECT_EQ(count("configure"), 1);
  EXPECT_EQ(group->epoch(), had_group ? 102u : 101u);
}

INSTANTIATE_TEST_SUITE_P(InEveryState, EveryFault,
                         testing::Combine(testing::Range(0, 8), testing::Range(0, 7),
                                          testing::Range(0, 2)),
                         [](const auto& info) {
                           return fmt::format("{}_{}_Rank{}", kWhen[std::get<0>(info.param)],
                                              kWhat[std::get<1>(info.param)],
                                              std::get<2>(info.param));
                         });

// Random events, as a launcher and two workers might bring them about. Whatever happens: a group is
// configured only of ranks that are attached, and only when nothing of the one before runs.
TEST(GroupLifecycle, RandomEventsNeverMixTwoGroupsAndAlwaysEndInUse) {
  struct Process {
    uint64_t id = 0;
    bool alive = false;
    bool stream = false;
    uint64_t runs = 0;  // the epoch whose plans it might run
    bool told_to_leave = false;
    bool must_ready = false;
  };
  for (uint32_t seed = 0; seed < 2000; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    uint64_t last_epoch = 0;
    uint64_t last_id = 0;
    int64_t now_us = 0;
    Process processes[2];
    GroupLifecycle group(2, [&] { return ++last_epoch; });
    group.OnWatching(true, now_us);
    group.SetPool(kPool);
    const auto take_actions = [&] {
      for (;;) {
        const Action action = group.NextAction(now_us);
        if (action == Action::kNone) return;
        Process& p = processes[group.rank()];
        switch (action) {
          case Action::kAbortGroup:
            ASSERT_TRUE(p.stream);
            p.told_to_leave = true;
            break;
          case Action::kEndWorker:
            if (p.alive && p.id == group.worker_id()) {
              p = {};
              group.OnExit(group.rank(), group.worker_id(), true, "was ended", now_us);
              if (group.attached(group.rank())) ADD_FAILURE();
            }
            break;
          case Action::kLoseGroup:
            for (const Process& other : processes) ASSERT_NE(other.runs, group.epoch());
            break;
          case Action::kConfigure:
            for (Process& other : processes) {
              ASSERT_TRUE(other.stream);
              ASSERT_EQ(other.runs, 0u);
              other.runs = group.epoch();
              other.told_to_leave = false;
            }
            break;
          case Action::kAttachPool:
            for (Process& other : processes) other.must_ready = true;
            break;
          case Action::kUseGroup:
            for (Process& other : processes) ASSERT_EQ(other.runs, group.epoch());
            break;
          case Action::kNone:
            break;
        }
      }
    };
    const auto step = [&](bool faults) {
      const uint32_t rank = random() % 2;
      Process& p = processes[rank];
      now_us += random() % kSecond;
      switch (random() % (faults ? 8 : 4)) {
        case 0:  // it starts, or attaches anew after it has left
          if (!p.alive) p = {.id = ++last_id, .alive = true};
          if (p.stream) break;
          p.runs = 0;
          p.told_to_leave = p.must_ready = false;
          p.stream = true;
          group.OnHello(rank, p.id, now_us);
          break;
        case 1:
          if (p.stream && p.told_to_leave) {
            p.told_to_leave = p.must_ready = false;
            ASSERT_TRUE(group.OnAborted(rank, std::exchange(p.runs, 0)));
          }
          break;
        case 2:
        case 3:
          if (p.stream && std::exchange(p.must_ready, false)) group.OnReady(rank, p.runs, kPool);
          break;
        case 4:
          if (p.alive) {
            const Process old = std::exchange(p, {});
            if (random() % 2 == 0 && old.stream) group.OnDisconnected(rank, "end", now_us);
            group.OnExit(rank, old.id, random() % 2 == 0, "died", now_us);
            if (old.stream) group.OnDisconnected(rank, "end", now_us);
          }
          break;
        case 5:
          if (std::exchange(p.stream, false)) group.OnDisconnected(rank, "broke", now_us);
          break;
        case 6:
          group.OnFault(FaultCause::kDivergence, random() % 2 == 0, "differs", now_us);
          break;
        case 7:
          now_us += 3 * kSecond;
          break;
      }
      if (random() % 3 != 0) take_actions();
    };
    for (int i = 0; i < 200 && !testing::Test::HasFatalFailure(); ++i) step(/*faults=*/true);
    for (int i = 0; i < 400 && !testing::Test::HasFatalFailure() && !group.in_use(); ++i) {
      step(/*faults=*/false);
    }
    take_actions();
    ASSERT_TRUE(group.in_use()) << group.WaitingFor();
  }
}

}  // namespace
}  // namespace wintserve
