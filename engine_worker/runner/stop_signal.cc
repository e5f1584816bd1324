#include "engine_worker/runner/stop_signal.h"

#include <pthread.h>
#include <signal.h>

#include <cstdlib>
#include <utility>

#include "common/exit_code.h"

namespace wintserve {
namespace {

sigset_t StopSignals() {
  sigset_t signals;
  ::sigemptyset(&signals);
  ::sigaddset(&signals, SIGTERM);
  return signals;
}

}  // namespace

StopSignal::StopSignal() {
  const sigset_t signals = StopSignals();
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGINT, SIG_IGN);
  thread_ = std::thread([this] { WaitForSignals(); });
}

StopSignal::~StopSignal() {
  {
    MutexLock lock(&mutex_);
    ended_ = true;
  }
  ::pthread_kill(thread_.native_handle(), SIGTERM);
  thread_.join();
}

void StopSignal::SetHandler(std::function<void()> handler) {
  MutexLock lock(&mutex_);
  handler_ = std::move(handler);
}

void StopSignal::WaitForSignals() {
  const sigset_t signals = StopSignals();
  while (true) {
    int signal = 0;
    ::sigwait(&signals, &signal);
    MutexLock lock(&mutex_);
    if (ended_) return;
    if (handler_ == nullptr) std::_Exit(kExitOk);
    handler_();
  }
}

}  // namespace wintserve
