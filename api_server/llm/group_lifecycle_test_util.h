// A GroupLifecycle of two ranks as its tests drive it.
#pragma once

#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "api_server/llm/group_lifecycle.h"

namespace wintserve {

inline constexpr int64_t kSecond = 1'000'000;
inline constexpr uint64_t kPool = 77;

inline const char* NameOf(GroupLifecycle::Action action) {
  switch (action) {
    case GroupLifecycle::Action::kNone:
      return "none";
    case GroupLifecycle::Action::kAbortGroup:
      return "abort";
    case GroupLifecycle::Action::kEndWorker:
      return "end";
    case GroupLifecycle::Action::kLoseGroup:
      return "lose";
    case GroupLifecycle::Action::kConfigure:
      return "configure";
    case GroupLifecycle::Action::kAttachPool:
      return "attach";
    case GroupLifecycle::Action::kUseGroup:
      return "use";
  }
  return "?";
}

// Two ranks, whose processes are 10 and 11, then 20 and 21, …; time is set by hand.
class Group {
 public:
  Group() : lifecycle_(2, [this] { return ++last_epoch_; }) {
    lifecycle_.OnWatching(true, now_us_);
  }

  // "abort 1", "end 0 10", "lose trusted", "configure", …
  std::vector<std::string> Actions() {
    std::vector<std::string> actions;
    for (;;) {
      const GroupLifecycle::Action action = lifecycle_.NextAction(now_us_);
      if (action == GroupLifecycle::Action::kNone) return actions;
      std::string text = NameOf(action);
      if (action == GroupLifecycle::Action::kAbortGroup)
        text += fmt::format(" {}", lifecycle_.rank());
      if (action == GroupLifecycle::Action::kEndWorker) {
        text += fmt::format(" {} {}", lifecycle_.rank(), lifecycle_.worker_id());
      }
      if (action == GroupLifecycle::Action::kLoseGroup)
        text += lifecycle_.kv_trusted() ? " trusted" : " wrong";
      actions.push_back(text);
    }
  }
  std::vector<std::string> ActionsAfter(int64_t us) {
    now_us_ += us;
    return Actions();
  }

  GroupLifecycle* operator->() { return &lifecycle_; }
  void Hello(uint32_t rank) {
    ++generation_[rank];
    SameHello(rank);
  }
  void SameHello(uint32_t rank) { lifecycle_.OnHello(rank, id(rank), now_us_); }
  void Drop(uint32_t rank) { lifecycle_.OnDisconnected(rank, "the stream ended", now_us_); }
  bool Exit(uint32_t rank, bool kv_trusted = true) {
    return lifecycle_.OnExit(rank, id(rank), kv_trusted, "was ended by signal 9", now_us_);
  }
  void Fault(bool kv_trusted) {
    lifecycle_.OnFault(FaultCause::kDivergence, kv_trusted, "it went wrong", now_us_);
  }
  bool Aborted(uint32_t rank) { return lifecycle_.OnAborted(rank, lifecycle_.epoch()); }
  bool Ready(uint32_t rank) { return lifecycle_.OnReady(rank, lifecycle_.epoch(), kPool); }
  uint64_t id(uint32_t rank) const { return 10 * generation_[rank] + rank; }
  int64_t now_us() const { return now_us_; }

  void Gather() {
    Hello(0);
    Hello(1);
    EXPECT_THAT(Actions(), testing::ElementsAre("configure"));
  }
  void Attach() {
    Gather();
    lifecycle_.SetPool(kPool);
    EXPECT_THAT(Actions(), testing::ElementsAre("attach"));
  }
  void Use() {
    Attach();
    EXPECT_TRUE(Ready(0));
    EXPECT_TRUE(Ready(1));
    EXPECT_THAT(Actions(), testing::ElementsAre("use"));
  }
  // From a gathered group on.
  void UseAgain() {
    EXPECT_THAT(Actions(), testing::ElementsAre("attach"));
    EXPECT_TRUE(Ready(0));
    EXPECT_TRUE(Ready(1));
    EXPECT_THAT(Actions(), testing::ElementsAre("use"));
  }

 private:
  int64_t now_us_ = 1'000 * kSecond;
  uint64_t last_epoch_ = 100;
  uint64_t generation_[2] = {};
  GroupLifecycle lifecycle_;
};

}  // namespace wintserve
