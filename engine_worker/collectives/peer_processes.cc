#include "engine_worker/collectives/peer_processes.h"

#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <thread>

extern "C" {
#include <sys/pidfd.h>  // glibc 2.36 declares its functions without C linkage for C++
}

namespace wintserve {

ProcessPlace OwnProcessPlace() {
  struct stat info = {};
  if (::stat("/proc/self/ns/pid", &info) != 0) return {};
  return {.pid_namespace = info.st_ino, .pid = ::getpid()};
}

void PeerProcesses::Watch(std::span<const ProcessPlace> places) {
  const ProcessPlace own = OwnProcessPlace();
  for (const ProcessPlace& place : places) {
    UniqueFd& pidfd = pidfds_.emplace_back();
    was_gone_.push_back(false);
    if (own.pid_namespace == 0 || place.pid_namespace != own.pid_namespace) continue;
    pidfd.Reset(::pidfd_open(static_cast<pid_t>(place.pid), 0));
    was_gone_.back() = !pidfd.valid() && errno == ESRCH;
  }
}

bool PeerProcesses::IsGone(int rank) const {
  if (rank >= static_cast<int>(pidfds_.size())) return false;
  if (was_gone_[rank]) return true;
  pollfd ended = {.fd = pidfds_[rank].get(), .events = POLLIN, .revents = 0};
  return pidfds_[rank].valid() && ::poll(&ended, 1, 0) == 1;
}

bool PeerProcesses::AnyIsGone(int64_t timeout_ms) const {
  using std::chrono::steady_clock;
  const auto deadline = steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  while (true) {
    for (int rank = 0; rank < static_cast<int>(pidfds_.size()); ++rank) {
      if (IsGone(rank)) return true;
    }
    if (steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

}  // namespace wintserve
