// SOCK_SEQPACKET Unix sockets that carry one message a packet and file descriptors beside it
// (SCM_RIGHTS), which gRPC cannot. Peers of another user are refused (SO_PEERCRED).
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/unique_fd.h"

namespace wintserve {

inline constexpr int kMaxPacketBytes = 64 << 10;

struct Packet {
  std::string bytes;
  UniqueFd fd;  // -1 when the packet carried none
};

// Binds and listens at `path`, mode 0600. The caller unlinks it.
absl::StatusOr<UniqueFd> ListenUnix(const std::string& path);

// Waits for a peer of our own user; others are closed and the wait goes on.
// CANCELLED: listen_fd was shut down (shutdown(2) wakes the wait).
absl::StatusOr<UniqueFd> AcceptUnix(int listen_fd);

// UNAVAILABLE: nobody listens there within timeout_ms (retried, since the peer may still be
// starting).
absl::StatusOr<UniqueFd> ConnectUnix(const std::string& path, int64_t timeout_ms);

// fd -1 sends none.
absl::Status SendPacket(int socket_fd, const std::string& bytes, int fd = -1);

// DEADLINE_EXCEEDED: nothing came within timeout_ms (-1: wait for ever). OUT_OF_RANGE: the peer
// closed.
absl::StatusOr<Packet> ReceivePacket(int socket_fd, int64_t timeout_ms);

}  // namespace wintserve
