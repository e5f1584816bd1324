#include "tools/eval/local_server.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <httplib.h>
#include <netinet/in.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <utility>

#include "absl/strings/escaping.h"
#include "common/check.h"
#include "common/progress.h"
#include "common/status_macros.h"

namespace wintserve::eval {
namespace {

// Longer than the server takes to end its own processes by force.
constexpr int64_t kStopGraceMs = 20000;
constexpr off_t kTailBytes = 4096;
constexpr int kTailLines = 12;
constexpr int kLoadingFd = 3;  // its number in the server

// Nobody holds it between here and the server's own bind; Start says what becomes of that.
absl::StatusOr<int> FreeLoopbackPort() {
  const UniqueFd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  if (!socket.valid() || ::bind(socket.get(), generic, size) != 0 ||
      ::getsockname(socket.get(), generic, &size) != 0) {
    return absl::ErrnoToStatus(errno, "cannot find a free port");
  }
  return ntohs(address.sin_port);
}

std::string RandomKey() {
  char bytes[16];
  CHECK(::getrandom(bytes, sizeof(bytes), 0) == sizeof(bytes), "getrandom: errno={}", errno);
  return absl::BytesToHexString(absl::string_view(bytes, sizeof(bytes)));
}

absl::StatusOr<UniqueFd> OpenLog(const std::string& path) {
  const std::string directory = std::filesystem::temp_directory_path().string();
  UniqueFd log(path.empty() ? ::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600)
                            : ::open(path.c_str(), O_CREAT | O_TRUNC | O_RDWR | O_CLOEXEC, 0644));
  if (!log.valid()) {
    const std::string what = path.empty()
                                 ? fmt::format("the server's log: cannot write to {}", directory)
                                 : fmt::format("--server-log: cannot write {}", path);
    return absl::ErrnoToStatus(errno, what);
  }
  return log;
}

}  // namespace

absl::StatusOr<LocalServer> LocalServer::Start(const LocalServerOptions& options) {
  LocalServer server;
  ASSIGN_OR_RETURN(const int port, FreeLoopbackPort());
  server.url_ = fmt::format("http://127.0.0.1:{}", port);
  server.api_key_ = options.api_key.empty() ? RandomKey() : options.api_key;
  ASSIGN_OR_RETURN(server.log_, OpenLog(options.log_path));

  ChildOptions child;
  child.argv = {options.program, "serve", "--model", options.model};
  child.argv.insert(child.argv.end(), options.flags.begin(), options.flags.end());
  // Behind the caller's flags: of repeats the last one counts.
  for (std::string flag :
       {fmt::format("--port={}", port), std::string("--host=127.0.0.1"),
        std::string("--metrics-port=0"), std::string("--engine-worker-queue-port=0"),
        std::string("--cache-queue-port=0")}) {
    child.argv.push_back(std::move(flag));
  }
  // Not a flag, which every user of the machine can read.
  child.environment = {"FD_API_KEY=" + server.api_key_};
  if (options.loading_fd >= 0) {
    child.descriptors.push_back({options.loading_fd, kLoadingFd});
    child.environment.push_back(fmt::format("{}={}", kLoadingFdVariable, kLoadingFd));
  }
  child.output_fd = server.log_.get();
  ASSIGN_OR_RETURN(server.process_, ChildProcess::Spawn(child));
  return server;
}

bool LocalServer::IsReady() const {
  httplib::Client client(url_);
  client.set_connection_timeout(1);
  client.set_read_timeout(1);
  const httplib::Result result = client.Get("/ready");
  return result && result->status == 200;
}

void LocalServer::Stop() { process_.Stop(kStopGraceMs); }

std::string LocalServer::LogTail() const {
  struct stat status = {};
  if (::fstat(log_.get(), &status) != 0) return "";
  std::string tail(static_cast<size_t>(std::min<off_t>(status.st_size, kTailBytes)), '\0');
  const ssize_t count =
      ::pread(log_.get(), tail.data(), tail.size(), status.st_size - std::ssize(tail));
  tail.resize(static_cast<size_t>(std::max<ssize_t>(0, count)));
  size_t begin = tail.size();
  for (int line = 0; line <= kTailLines && begin != std::string::npos && begin > 0; ++line) {
    begin = tail.rfind('\n', begin - 1);
  }
  if (begin != std::string::npos && begin < tail.size()) tail.erase(0, begin + 1);
  if (!tail.empty() && tail.back() != '\n') tail += '\n';
  return tail;
}

}  // namespace wintserve::eval
