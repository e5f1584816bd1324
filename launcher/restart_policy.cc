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

// Who was ended from outside need not have run for long to be in order; a fault may take its time.
constexpr seconds kGoodRunBeforeOutsideEnd(2);
constexpr seconds kGoodRunBeforeFault(60);

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

std::optional<milliseconds> RestartPolicy::OnExit(bool self_inflicted, TimePoint started,
                                                  TimePoint now, double chance) {
  if (self_inflicted) self_inflicted_.push_back(now);
  while (!self_inflicted_.empty() && now - self_inflicted_.front() > kWindow) {
    self_inflicted_.pop_front();
  }
  if (self_inflicted && self_inflicted_.size() > kMaxSelfInflicted) return std::nullopt;

  const seconds good_run = self_inflicted ? kGoodRunBeforeFault : kGoodRunBeforeOutsideEnd;
  if (now - started >= good_run) num_in_row_ = 0;
  ++num_in_row_;
  if (num_in_row_ == 1) return milliseconds(0);
  const int num_doublings = std::min(num_in_row_ - 2, 16);
  const milliseconds pause = std::min(kFirstPause * (1 << num_doublings), kLongestPause);
  return pause + std::chrono::duration_cast<milliseconds>(pause * (chance / 4));
}

}  // namespace wintserve
