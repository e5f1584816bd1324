#include "common/child_process.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "common/check.h"

// glibc 2.36 declares its functions without C linkage.
extern "C" {
#include <sys/pidfd.h>
}

namespace wintserve {
namespace {

constexpr int64_t kDestructorGraceMs = 2000;

// What the child reports when it cannot become the program.
struct Failure {
  int error_number;
  char step[16];
};

// Everything that the child needs, laid out before fork: afterwards only async-signal-safe calls.
struct Preparation {
  std::vector<char*> argv;
  std::vector<char*> environment;
  const std::vector<ChildOptions::Descriptor>* descriptors;
  std::vector<int> moved;  // room for one number each
  int first_free = 3;      // above every child_fd
  int output_fd = -1;
  bool keeps_stdout = false;
  int status_fd = -1;
  pid_t parent = -1;
};

[[noreturn]] void Fail(int status_fd, const char* step) {
  Failure failure = {errno, {}};
  ::strncpy(failure.step, step, sizeof(failure.step) - 1);
  [[maybe_unused]] const ssize_t written = ::write(status_fd, &failure, sizeof(failure));
  ::_exit(127);
}

// Gives every descriptor its number and marks all others close-on-exec. Two passes, since a target
// number may be another one's source.
void PlaceDescriptors(Preparation* preparation) {
  const auto& descriptors = *preparation->descriptors;
  preparation->status_fd =
      ::fcntl(preparation->status_fd, F_DUPFD_CLOEXEC, preparation->first_free);
  for (size_t i = 0; i < descriptors.size(); ++i) {
    preparation->moved[i] = ::fcntl(descriptors[i].fd, F_DUPFD_CLOEXEC, preparation->first_free);
    if (preparation->moved[i] < 0) Fail(preparation->status_fd, "dup");
  }
  // Now that they may be our own streams no more.
  if (preparation->output_fd >= 0) {
    for (const int stream : {STDOUT_FILENO, STDERR_FILENO}) {
      if (stream == STDOUT_FILENO && preparation->keeps_stdout) continue;
      if (::dup2(preparation->output_fd, stream) < 0) Fail(preparation->status_fd, "dup2");
    }
  }
  if (::close_range(3, ~0U, CLOSE_RANGE_CLOEXEC) != 0) Fail(preparation->status_fd, "close_range");
  for (size_t i = 0; i < descriptors.size(); ++i) {
    if (::dup2(preparation->moved[i], descriptors[i].child_fd) < 0) {
      Fail(preparation->status_fd, "dup2");
    }
  }
  const int null_fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (null_fd < 0 || ::dup2(null_fd, STDIN_FILENO) < 0) Fail(preparation->status_fd, "/dev/null");
}

[[noreturn]] void RunChild(Preparation* preparation) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  // The parent may have died before the line above.
  if (::getppid() != preparation->parent) ::_exit(127);
  for (int number = 1; number < NSIG; ++number) ::signal(number, SIG_DFL);
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  PlaceDescriptors(preparation);
  ::execve(preparation->argv[0], preparation->argv.data(), preparation->environment.data());
  Fail(preparation->status_fd, "exec");
}

std::vector<char*> Pointers(const std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  pointers.reserve(strings.size() + 1);  // callers add the null pointer
  for (const std::string& text : strings) pointers.push_back(const_cast<char*>(text.c_str()));
  return pointers;
}

}  // namespace

std::string ChildExit::ToString() const {
  return by_signal ? fmt::format("signal {} ({})", code, ::strsignal(code))
                   : fmt::format("exit code {}", code);
}

absl::StatusOr<ChildProcess> ChildProcess::Spawn(const ChildOptions& options) {
  CHECK(!options.argv.empty());
  Preparation preparation;
  preparation.argv = Pointers(options.argv);
  preparation.argv.push_back(nullptr);
  preparation.environment = Pointers(options.environment);
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (options.inherits == nullptr || options.inherits(text.substr(0, text.find('=')))) {
      preparation.environment.push_back(*entry);
    }
  }
  preparation.environment.push_back(nullptr);
  preparation.descriptors = &options.descriptors;
  preparation.moved.resize(options.descriptors.size());
  for (const ChildOptions::Descriptor& descriptor : options.descriptors) {
    CHECK(descriptor.child_fd >= 3, "child_fd={}", descriptor.child_fd);
    preparation.first_free = std::max(preparation.first_free, descriptor.child_fd + 1);
  }
  CHECK(options.output_fd == -1 || options.output_fd >= 3, "output_fd={}", options.output_fd);
  preparation.output_fd = options.output_fd;
  preparation.keeps_stdout = options.keeps_stdout;
  preparation.parent = ::getpid();

  int pipe_fds[2];
  if (::pipe2(pipe_fds, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "pipe");
  UniqueFd read_end(pipe_fds[0]);
  UniqueFd write_end(pipe_fds[1]);
  preparation.status_fd = write_end.get();

  // A handler of ours must not run in the child before it has reset them.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  const pid_t pid = ::fork();
  if (pid == 0) RunChild(&preparation);
  const int fork_errno = errno;
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (pid < 0) {
    return absl::ErrnoToStatus(fork_errno, fmt::format("cannot start {}", options.argv[0]));
  }
  write_end.Reset();

  ChildProcess child;
  child.pid_ = pid;
  child.pidfd_.Reset(::pidfd_open(pid, 0));
  if (!child.pidfd_.valid()) {
    const absl::Status status = absl::ErrnoToStatus(errno, "pidfd_open");
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    return status;
  }
  // End of file: exec closed the pipe.
  Failure failure = {};
  ssize_t count;
  do {
    count = ::read(read_end.get(), &failure, sizeof(failure));
  } while (count < 0 && errno == EINTR);
  if (count == sizeof(failure)) {
    child.Wait(-1);
    return absl::ErrnoToStatus(failure.error_number,
                               fmt::format("cannot start {} ({})", options.argv[0], failure.step));
  }
  return child;
}

ChildProcess::ChildProcess(ChildProcess&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)),
      pidfd_(std::move(other.pidfd_)),
      exit_(std::exchange(other.exit_, std::nullopt)) {}

ChildProcess& ChildProcess::operator=(ChildProcess&& other) noexcept {
  if (this != &other) {
    Stop(kDestructorGraceMs);
    pid_ = std::exchange(other.pid_, -1);
    pidfd_ = std::move(other.pidfd_);
    exit_ = std::exchange(other.exit_, std::nullopt);
  }
  return *this;
}

ChildProcess::~ChildProcess() { Stop(kDestructorGraceMs); }

std::optional<ChildExit> ChildProcess::Wait(int64_t timeout_ms) {
  if (!running()) return exit_;
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::milliseconds(std::max<int64_t>(0, timeout_ms));
  pollfd wait = {pidfd_.get(), POLLIN, 0};
  while (true) {
    int left_ms = -1;
    if (timeout_ms >= 0) {
      left_ms = static_cast<int>(std::max<int64_t>(
          0, std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count()));
    }
    const int ready = ::poll(&wait, 1, left_ms);
    if (ready > 0) break;
    if (ready == 0) return std::nullopt;
    CHECK(errno == EINTR, "poll: errno={}", errno);
  }
  siginfo_t info = {};
  while (::waitid(P_PIDFD, pidfd_.get(), &info, WEXITED) != 0) {
    CHECK(errno == EINTR, "waitid: errno={}", errno);
  }
  exit_ = ChildExit{info.si_code != CLD_EXITED, info.si_status};
  pidfd_.Reset();
  return exit_;
}

void ChildProcess::Signal(int signal_number) {
  if (running()) ::pidfd_send_signal(pidfd_.get(), signal_number, nullptr, 0);
}

void ChildProcess::Stop(int64_t grace_ms) {
  if (!running()) return;
  Signal(SIGTERM);
  if (Wait(grace_ms).has_value()) return;
  Signal(SIGKILL);
  Wait(-1);
}

}  // namespace wintserve
