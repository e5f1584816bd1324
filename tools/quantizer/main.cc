// The program of `wintserve quantize`.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <string>
#include <string_view>
#include <thread>

#include "common/exit_code.h"
#include "common/log.h"
#include "tools/quantizer/quantize.h"

namespace wintserve::quantizer {
namespace {

std::atomic<bool> stop = false;
std::atomic<int> stop_signal = 0;
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<int>::is_always_lock_free);

void Write(std::string_view text) {
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text.data(), text.size());
}

// The first one ends the run after the matrix that is worked on; the second one ends it at once.
void OnStop(int number) {
  const int error = errno;  // of the call that is interrupted
  stop_signal = number;
  stop = true;
  Write("\nstopping after this matrix; once more to stop at once\n");
  errno = error;
}

// fmt::print ends the program where a disk is full. The checkpoint matters more than this.
void Show(const std::string& text) { (void)std::fputs(text.c_str(), stdout); }
void Tell(const std::string& line) { (void)std::fputs((line + "\n").c_str(), stderr); }

void InstallHandlers() {
  struct sigaction action = {};
  action.sa_handler = OnStop;
  action.sa_flags = SA_RESTART | static_cast<int>(SA_RESETHAND);
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) ::sigaction(number, &action, nullptr);
  // A limit on the size of files is a full disk to us.
  ::signal(SIGXFSZ, SIG_IGN);
  ::signal(SIGPIPE, SIG_IGN);
}

int Main(int argc, char** argv) {
  const QuantizeCommand command = ParseQuantizeCommand(
      {argv + 1, argv + argc}, static_cast<int>(std::thread::hardware_concurrency()));
  Show(command.print);
  if (!command.error.empty()) Tell(command.error);
  if (!command.run) return command.error.empty() ? kExitOk : kExitUsage;
  InstallHandlers();
  InitLog("quantize", "warning");
  const QuantizeResult result = Quantize(command.options, &stop);
  if (!result.error.empty()) Tell("error: " + result.error);
  Show(result.summary);
  if (result.stopped) {
    // Whoever waits for us shall see that we were stopped.
    ::signal(stop_signal, SIG_DFL);
    ::raise(stop_signal);
  }
  return result.exit_code;
}

}  // namespace
}  // namespace wintserve::quantizer

int main(int argc, char** argv) { return wintserve::quantizer::Main(argc, argv); }
