// SOCK_SEQPACKET Unix sockets that carry one message a packet and file descriptors beside it
// (SCM_RIGHTS), which gRPC cannot. Peers of another user are refused (SO_PEERCRED).
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/unique_fd.h"

namespace wintserve {

inline constexpr int kMaxPacketBytes = 64 << 10;
inline constexpr int kMaxPacketFds = 253;  // the kernel's SCM_MAX_FD

struct Packet {
  std::string bytes;
  UniqueFd fd;  // -1 when the packet carried none
};

struct PacketWithFds {
  std::string bytes;
  std::vector<UniqueFd> fds;  // in the order in which they were sent
};

// Where an instance's sockets may lie: a directory (no symbolic link to one) that our user owns and
// that nobody else can enter. PERMISSION_DENIED names it and what is wrong with it.
absl::Status CheckPrivateDirectory(const std::string& path);

// Binds and listens at `path`, mode 0600. The caller unlinks it. type: as socket(2) takes it.
absl::StatusOr<UniqueFd> ListenUnix(const std::string& path, int type = SOCK_SEQPACKET);

// Waits for a peer of our own user; others are closed and the wait goes on.
// CANCELLED: listen_fd was shut down (shutdown(2) wakes the wait). UNAVAILABLE, only if listen_fd
// is non-blocking: no peer of our user is waiting. Other errors: accept(2) failed, most likely for
// lack of descriptors; the peer still waits. The socket blocks, whatever listen_fd does.
absl::StatusOr<UniqueFd> AcceptUnix(int listen_fd);

// UNAVAILABLE: nobody listens there, or the queue of those who wait to be accepted is full, until
// timeout_ms have passed (retried, since the peer may still be starting). The socket blocks.
absl::StatusOr<UniqueFd> ConnectUnix(const std::string& path, int64_t timeout_ms);

// fd -1 sends none.
absl::Status SendPacket(int socket_fd, const std::string& bytes, int fd = -1);
// INVALID_ARGUMENT: more than kMaxPacketFds.
absl::Status SendPacket(int socket_fd, const std::string& bytes, std::span<const int> fds);

// DEADLINE_EXCEEDED: nothing came within timeout_ms (-1: wait for ever). OUT_OF_RANGE: the peer
// closed. INVALID_ARGUMENT: more than one descriptor.
absl::StatusOr<Packet> ReceivePacket(int socket_fd, int64_t timeout_ms);
// The same, with any number of descriptors.
absl::StatusOr<PacketWithFds> ReceivePacketWithFds(int socket_fd, int64_t timeout_ms);

}  // namespace wintserve
