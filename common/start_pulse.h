// How a process that its launcher has started shows that it is alive until it has said so
// elsewhere: it adds to the number of an eventfd that both hold. Whether its work gets further is
// another question, which it has to answer itself; but a process that is frozen answers none.
#pragma once

#include <chrono>
#include <cstdint>
#include <thread>

#include "common/mutex.h"
#include "common/unique_fd.h"

namespace wintserve {

// The end of the process that starts. Threading: construct once the signals that the process waits
// for are blocked; the rest on one thread.
class StartPulse {
 public:
  // So often it gives a sign, the first one at once.
  static constexpr std::chrono::milliseconds kPeriod{250};

  // Takes the eventfd over; -1: nobody wants to know.
  explicit StartPulse(int event_fd);
  // Ends the signs.
  ~StartPulse();
  StartPulse(const StartPulse&) = delete;
  StartPulse& operator=(const StartPulse&) = delete;

  // The last sign: from now on others notice when the process hangs. No effect a second time.
  void Started();

 private:
  void Run() EXCLUDES(mutex_);
  void Stop() EXCLUDES(mutex_);

  UniqueFd fd_;
  Mutex mutex_;
  CondVar changed_;
  bool is_over_ GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// What has come since the last look.
struct StartSigns {
  bool is_alive = false;  // at least one sign
  bool has_started = false;
};

// The launcher's end; never blocks. event_fd: made by MakeStartPulse.
UniqueFd MakeStartPulse();
StartSigns TakeStartSigns(int event_fd);

}  // namespace wintserve
