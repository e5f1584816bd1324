#include "common/unix_socket.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "common/status_macros.h"

namespace wintserve {
namespace {

absl::StatusOr<sockaddr_un> Address(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(
        fmt::format("socket path {} is longer than {} bytes", path, sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

// The descriptors that came with a message, which then belong to the caller.
std::vector<UniqueFd> TakeFds(msghdr* message) {
  std::vector<UniqueFd> fds;
  for (cmsghdr* header = CMSG_FIRSTHDR(message); header != nullptr;
       header = CMSG_NXTHDR(message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t num_fds = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < num_fds; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      fds.emplace_back(fd);
    }
  }
  return fds;
}

// INVALID_ARGUMENT: longer than kMaxPacketBytes, or more than max_fds descriptors.
absl::StatusOr<PacketWithFds> Receive(int socket_fd, int64_t timeout_ms, int max_fds) {
  pollfd wait = {socket_fd, POLLIN, 0};
  int ready;
  do {
    ready = ::poll(&wait, 1, static_cast<int>(timeout_ms));
  } while (ready < 0 && errno == EINTR);
  if (ready < 0) return absl::ErrnoToStatus(errno, "poll");
  if (ready == 0) {
    return absl::DeadlineExceededError(fmt::format("no packet within {} ms", timeout_ms));
  }

  PacketWithFds packet;
  packet.bytes.resize(kMaxPacketBytes);
  iovec part = {packet.bytes.data(), packet.bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxPacketFds * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = CMSG_SPACE(max_fds * sizeof(int));
  ssize_t received;
  do {
    received = ::recvmsg(socket_fd, &message, MSG_CMSG_CLOEXEC);
  } while (received < 0 && errno == EINTR);
  if (received < 0) return absl::ErrnoToStatus(errno, "recvmsg");
  packet.fds = TakeFds(&message);
  // A protobuf message of default values has no bytes; beside a descriptor it is a packet all the
  // same.
  if (received == 0 && packet.fds.empty()) {
    return absl::OutOfRangeError("the peer closed the socket");
  }
  // The alignment of the control buffer leaves room for more than what is allowed.
  if (std::ssize(packet.fds) > max_fds || (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
    return absl::InvalidArgumentError(
        fmt::format("packet is longer than {} bytes or carries {} descriptors", kMaxPacketBytes,
                    max_fds == 1 ? "several" : fmt::format("more than {}", max_fds)));
  }
  packet.bytes.resize(received);
  return packet;
}

bool PeerIsOurUser(int fd) {
  ucred peer = {};
  socklen_t length = sizeof(peer);
  return ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && peer.uid == ::geteuid();
}

}  // namespace

absl::Status CheckPrivateDirectory(const std::string& path) {
  struct stat info = {};
  std::string reason;
  if (::lstat(path.c_str(), &info) != 0) {
    reason = std::strerror(errno);
  } else if (S_ISLNK(info.st_mode)) {
    reason = "is a symbolic link";
  } else if (!S_ISDIR(info.st_mode)) {
    reason = "is not a directory";
  } else if (info.st_uid != ::geteuid()) {
    reason = fmt::format("belongs to user {}, not to {}", info.st_uid, ::geteuid());
  } else if ((info.st_mode & 07777) != 0700) {
    reason = fmt::format("has mode {:04o}, must be 0700", info.st_mode & 07777);
  } else {
    return absl::OkStatus();
  }
  return absl::PermissionDeniedError(fmt::format("runtime directory: {}: {}", path, reason));
}

absl::StatusOr<UniqueFd> ListenUnix(const std::string& path, int type) {
  ASSIGN_OR_RETURN(const sockaddr_un address, Address(path));
  UniqueFd fd(::socket(AF_UNIX, type | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, "socket");
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 ||
      ::chmod(path.c_str(), 0600) != 0 || ::listen(fd.get(), 64) != 0) {
    return absl::ErrnoToStatus(errno, fmt::format("cannot listen on {}", path));
  }
  return fd;
}

absl::StatusOr<UniqueFd> AcceptUnix(int listen_fd) {
  while (true) {
    UniqueFd fd(::accept4(listen_fd, nullptr, nullptr, SOCK_CLOEXEC));
    if (fd.valid()) {
      if (PeerIsOurUser(fd.get())) return fd;
      continue;
    }
    if (errno == EINVAL) return absl::CancelledError("the listening socket was shut down");
    if (errno != EINTR && errno != ECONNABORTED) return absl::ErrnoToStatus(errno, "accept");
  }
}

absl::StatusOr<UniqueFd> ConnectUnix(const std::string& path, int64_t timeout_ms) {
  ASSIGN_OR_RETURN(const sockaddr_un address, Address(path));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  while (true) {
    // On a full backlog, connect would block past the deadline; without blocking it is EAGAIN.
    UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd.valid()) return absl::ErrnoToStatus(errno, "socket");
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
      if (!PeerIsOurUser(fd.get())) {
        return absl::PermissionDeniedError(fmt::format("{} belongs to another user", path));
      }
      if (::fcntl(fd.get(), F_SETFL, 0) != 0) return absl::ErrnoToStatus(errno, "fcntl");
      return fd;
    }
    const bool may_still_come = errno == ENOENT || errno == ECONNREFUSED || errno == EAGAIN;
    if (!may_still_come || std::chrono::steady_clock::now() >= deadline) {
      return absl::UnavailableError(
          fmt::format("cannot connect to {}: {}", path, std::strerror(errno)));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

absl::Status SendPacket(int socket_fd, const std::string& bytes, int fd) {
  return SendPacket(socket_fd, bytes, std::span(&fd, fd >= 0 ? 1 : 0));
}

absl::Status SendPacket(int socket_fd, const std::string& bytes, std::span<const int> fds) {
  if (bytes.size() > kMaxPacketBytes || fds.size() > kMaxPacketFds) {
    return absl::InvalidArgumentError(
        fmt::format("packet of {} bytes and {} descriptors, at most {} and {}", bytes.size(),
                    fds.size(), kMaxPacketBytes, kMaxPacketFds));
  }
  iovec part = {const_cast<char*>(bytes.data()), bytes.size()};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxPacketFds * sizeof(int))] = {};
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size_bytes());
  }
  ssize_t sent;
  do {
    sent = ::sendmsg(socket_fd, &message, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0) return absl::ErrnoToStatus(errno, "sendmsg");
  return absl::OkStatus();
}

absl::StatusOr<Packet> ReceivePacket(int socket_fd, int64_t timeout_ms) {
  ASSIGN_OR_RETURN(PacketWithFds received, Receive(socket_fd, timeout_ms, /*max_fds=*/1));
  Packet packet;
  packet.bytes = std::move(received.bytes);
  if (!received.fds.empty()) packet.fd = std::move(received.fds[0]);
  return packet;
}

absl::StatusOr<PacketWithFds> ReceivePacketWithFds(int socket_fd, int64_t timeout_ms) {
  return Receive(socket_fd, timeout_ms, kMaxPacketFds);
}

}  // namespace wintserve
