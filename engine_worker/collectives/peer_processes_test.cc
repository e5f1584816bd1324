#include "engine_worker/collectives/peer_processes.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

namespace wintserve {
namespace {

constexpr int64_t kTimeoutMs = 60'000;

pid_t StartSleeper() {
  const pid_t child = ::fork();
  if (child != 0) return child;
  while (true) ::pause();
}

TEST(PeerProcesses, AKilledProcessIsGoneBeforeAnybodyReapsIt) {
  const pid_t child = StartSleeper();
  const ProcessPlace own = OwnProcessPlace();
  PeerProcesses processes;
  const ProcessPlace places[] = {own, {.pid_namespace = own.pid_namespace, .pid = child}};
  processes.Watch(places);
  EXPECT_FALSE(processes.AnyIsGone(/*timeout_ms=*/0));
  ::kill(child, SIGKILL);
  EXPECT_TRUE(processes.AnyIsGone(kTimeoutMs));
  EXPECT_TRUE(processes.IsGone(1));
  EXPECT_FALSE(processes.IsGone(0));
  ::waitpid(child, nullptr, 0);
  EXPECT_TRUE(processes.IsGone(1));
}

TEST(PeerProcesses, AProcessThatEndedBeforeItIsWatchedIsGone) {
  const pid_t child = StartSleeper();
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  PeerProcesses processes;
  const ProcessPlace places[] = {{.pid_namespace = OwnProcessPlace().pid_namespace, .pid = child}};
  processes.Watch(places);
  EXPECT_TRUE(processes.IsGone(0));
}

TEST(PeerProcesses, OfAnotherContainerNothingIsSaid) {
  const pid_t child = StartSleeper();
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  PeerProcesses processes;
  const ProcessPlace places[] = {
      {.pid_namespace = OwnProcessPlace().pid_namespace + 1, .pid = child}, {}};
  processes.Watch(places);
  EXPECT_FALSE(processes.AnyIsGone(/*timeout_ms=*/20));
}

}  // namespace
}  // namespace wintserve
