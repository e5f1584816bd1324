#include "common/start_pulse.h"

#include <sys/eventfd.h>

#include <cerrno>

#include "common/check.h"

namespace wintserve {
namespace {

constexpr eventfd_t kAlive = 1;
constexpr eventfd_t kStarted = eventfd_t{1} << 32;  // more than all signs before it

}  // namespace

StartPulse::StartPulse(int event_fd) : fd_(event_fd) {
  if (fd_.valid()) thread_ = std::thread([this] { Run(); });
}

StartPulse::~StartPulse() { Stop(); }

void StartPulse::Started() {
  if (!fd_.valid()) return;
  Stop();
  ::eventfd_write(fd_.get(), kStarted);
  fd_.Reset();
}

void StartPulse::Stop() {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(&mutex_);
    is_over_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void StartPulse::Run() {
  const auto is_over = [this]() NO_THREAD_SAFETY_ANALYSIS { return is_over_; };
  MutexLock lock(&mutex_);
  do {
    ::eventfd_write(fd_.get(), kAlive);
  } while (!changed_.WaitFor(&mutex_, kPeriod, is_over));
}

UniqueFd MakeStartPulse() { return UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)); }

StartSigns TakeStartSigns(int event_fd) {
  eventfd_t signs = 0;
  if (::eventfd_read(event_fd, &signs) != 0) return {};
  return {.is_alive = signs > 0, .has_started = signs >= kStarted};
}

}  // namespace wintserve
