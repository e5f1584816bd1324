#include "launcher/restart_policy.h"

#include <signal.h>

#include <algorithm>

#include "common/exit_code.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr milliseconds kFirstPause(500);
constexpr milliseconds kLongestPause(30'000);
constexpr milliseconds kLongestPauseAfterOutsideEnd(1000);

// Who was ended from outside need not have run for long to be in order; a fault, or a growth beyond
// the memory that there is, may take its time.
constexpr seconds kGoodRunBeforeOutsideEnd(2);
constexpr seconds kGoodRunBeforeFault(60);

// Before the next start, after so many ends in a row.
milliseconds PauseAfter(int num_in_row, milliseconds longest) {
  if (num_in_row <= 1) return milliseconds(0);
  const int num_doublings = std::min(num_in_row - 2, 16);
  return std::min(kFirstPause * (1 << num_doublings), longest);
}

}  // namespace

bool IsStartUpCode(const ChildExit& how) {
  return !how.by_signal &&
         (how.code == kExitUsage || how.code == kExitCheckpoint || how.code == kExitUnavailable ||
          how.code == kExitNeverReady || how.code == kExitConfigFile);
}

bool IsSelfInflicted(const ChildExit& how) {
  if (!how.by_signal) return how.code != kExitOk && how.code != kExitDrainTimeout;
  switch (how.code) {
    case SIGSEGV:
    case SIGABRT:
    case SIGBUS:
    case SIGILL:
    case SIGFPE:
    case SIGSYS:
    case SIGTRAP:
      return true;
    default:
      return false;
  }
}

bool KvIsTrusted(const ChildExit& how) { return !IsSelfInflicted(how) || IsStartUpCode(how); }

std::optional<milliseconds> RestartPolicy::OnExit(bool self_inflicted, bool out_of_memory,
                                                  TimePoint started, TimePoint now, double chance) {
  if (self_inflicted) self_inflicted_.push_back(now);
  while (!self_inflicted_.empty() && now - self_inflicted_.front() > kWindow) {
    self_inflicted_.pop_front();
  }
  if (self_inflicted && self_inflicted_.size() > kMaxSelfInflicted) return std::nullopt;

  if (now - started >= kGoodRunBeforeOutsideEnd) num_from_outside_ = 0;
  if (now - started >= kGoodRunBeforeFault) num_from_within_ = 0;
  const bool from_within = self_inflicted || out_of_memory;
  const milliseconds pause = from_within
                                 ? PauseAfter(++num_from_within_, kLongestPause)
                                 : PauseAfter(++num_from_outside_, kLongestPauseAfterOutsideEnd);
  return pause + std::chrono::duration_cast<milliseconds>(pause * (chance / 4));
}

}  // namespace wintserve
