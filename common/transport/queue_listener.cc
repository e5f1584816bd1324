#include "common/transport/queue_listener.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>

#include "common/check.h"
#include "common/log.h"
#include "common/transport/queue_transport.h"
#include "common/unix_socket.h"

namespace wintserve {
namespace {

constexpr int kBacklog = 4096;  // the kernel lowers it to net.core.somaxconn
constexpr int kRetryMs = 100;

absl::StatusOr<sockaddr_in> ParseAddress(const std::string& address) {
  sockaddr_in parsed = {};
  parsed.sin_family = AF_INET;
  const size_t colon = address.rfind(':');
  uint16_t port = 0;
  bool is_good = colon != std::string::npos;
  if (is_good) {
    const char* const end = address.data() + address.size();
    const auto [parsed_to, error] = std::from_chars(address.data() + colon + 1, end, port);
    is_good = error == std::errc() && parsed_to == end &&
              ::inet_pton(AF_INET, address.substr(0, colon).c_str(), &parsed.sin_addr) == 1;
  }
  if (!is_good) {
    return absl::UnavailableError(
        fmt::format("cannot listen on {}: must be an IPv4 address and a port", address));
  }
  parsed.sin_port = htons(port);
  return parsed;
}

int BoundPort(const UniqueFd& fd) {
  sockaddr_in address = {};
  socklen_t length = sizeof(address);
  ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length);
  return ntohs(address.sin_port);
}

}  // namespace

QueueListener::QueueListener(UniqueFd listener, int64_t max_connections)
    : listener_(std::move(listener)),
      max_connections_(max_connections),
      stop_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  CHECK(stop_.valid(), "eventfd: errno={}", errno);
}

absl::StatusOr<std::unique_ptr<QueueListener>> QueueListener::Tcp(const std::string& address,
                                                                  int64_t max_connections) {
  const absl::StatusOr<sockaddr_in> parsed = ParseAddress(address);
  if (!parsed.ok()) return parsed.status();
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const int on = 1;
  for (const int option : {SO_REUSEADDR, SO_REUSEPORT}) {
    ::setsockopt(fd.get(), SOL_SOCKET, option, &on, sizeof(on));
  }
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));  // connections inherit it
  const auto* name = reinterpret_cast<const sockaddr*>(&*parsed);
  if (::bind(fd.get(), name, sizeof(*parsed)) != 0 || ::listen(fd.get(), kBacklog) != 0) {
    return absl::UnavailableError(
        fmt::format("cannot listen on {}: {}", address, std::strerror(errno)));
  }
  const int port = BoundPort(fd);
  std::unique_ptr<QueueListener> listener(new QueueListener(std::move(fd), max_connections));
  listener->port_ = port;
  return listener;
}

absl::StatusOr<std::unique_ptr<QueueListener>> QueueListener::Unix(const std::string& path,
                                                                   int64_t max_connections) {
  struct stat info = {};
  if (::lstat(path.c_str(), &info) == 0 && S_ISSOCK(info.st_mode)) ::unlink(path.c_str());
  absl::StatusOr<UniqueFd> fd = ListenUnix(path, SOCK_STREAM | SOCK_NONBLOCK);
  if (!fd.ok()) return absl::UnavailableError(fd.status().message());
  std::unique_ptr<QueueListener> listener(new QueueListener(*std::move(fd), max_connections));
  listener->unix_path_ = path;
  return listener;
}

QueueListener::~QueueListener() {
  Stop();
  if (!unix_path_.empty()) ::unlink(unix_path_.c_str());
}

void QueueListener::AddTo(grpc::ServerBuilder* builder, const TlsIdentity& tls) {
  using Type = grpc::ServerBuilder::experimental_type::ExternalConnectionType;
  acceptor_ = builder->experimental().AddExternalConnectionAcceptor(Type::FROM_FD,
                                                                    QueueServerCredentials(tls));
}

void QueueListener::Start() {
  CHECK(acceptor_ != nullptr, "no server");
  thread_ = std::thread([this] { Run(); });
}

void QueueListener::Stop() {
  if (thread_.joinable()) {
    ::eventfd_write(stop_.get(), 1);
    thread_.join();
  }
  listener_.Reset();  // who comes now is refused instead of kept waiting
}

void QueueListener::Run() {
  while (true) {
    if (!HasRoom()) {
      if (WaitBeforeRetry()) return;
      continue;
    }
    pollfd fds[] = {{stop_.get(), POLLIN, 0}, {listener_.get(), POLLIN, 0}};
    if (::poll(fds, 2, -1) < 0 && errno != EINTR) return;
    if (fds[0].revents != 0) return;
    if (fds[1].revents == 0) continue;
    const int fd = ::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) {
      HandOver(UniqueFd(fd));
    } else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
      // Out of descriptors, most likely: the next try would fail at once, for ever.
      if (const auto more = error_log_.Admit()) {
        LOG_WARNING("cannot accept a connection to a queue: {}{}", std::strerror(errno), *more);
      }
      if (WaitBeforeRetry()) return;
    }
  }
}

void QueueListener::HandOver(UniqueFd fd) {
  struct stat info = {};
  if (::fstat(fd.get(), &info) != 0) return;
  connections_.push_back({fd.get(), info.st_ino});
  grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters parameters;
  parameters.listener_fd = listener_.get();
  parameters.fd = fd.Release();
  acceptor_->HandleNewConnection(&parameters);
}

bool QueueListener::HasRoom() {
  if (std::ssize(connections_) < max_connections_) return true;
  std::erase_if(connections_, [](const Connection& connection) {
    struct stat info = {};
    return ::fstat(connection.fd, &info) != 0 || !S_ISSOCK(info.st_mode) ||
           info.st_ino != connection.inode;
  });
  return std::ssize(connections_) < max_connections_;
}

bool QueueListener::WaitBeforeRetry() {
  pollfd wait = {stop_.get(), POLLIN, 0};
  return ::poll(&wait, 1, kRetryMs) > 0;
}

}  // namespace wintserve
