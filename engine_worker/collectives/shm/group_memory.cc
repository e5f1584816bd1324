#include "engine_worker/collectives/shm/group_memory.h"

#include <fmt/format.h>

#include <utility>

#include "common/status_macros.h"
#include "common/unix_socket.h"
#include "proto/supervisor.pb.h"

namespace wintserve {

absl::StatusOr<MappedMemory> FetchGroupMemory(const std::string& socket_path,
                                              const std::string& token, uint64_t group_epoch,
                                              int64_t size_bytes, int64_t timeout_ms) {
  proto::SupervisorRequest request;
  request.set_token(token);
  request.mutable_group_memory()->set_group_epoch(group_epoch);
  request.mutable_group_memory()->set_size_bytes(size_bytes);

  ASSIGN_OR_RETURN(const UniqueFd socket, ConnectUnix(socket_path, timeout_ms));
  RETURN_IF_ERROR(SendPacket(socket.get(), request.SerializeAsString()));
  ASSIGN_OR_RETURN(Packet packet, ReceivePacket(socket.get(), timeout_ms));

  proto::SupervisorReply reply;
  if (!reply.ParseFromString(packet.bytes)) {
    return absl::InternalError(
        fmt::format("{}: {} bytes that are no reply", socket_path, packet.bytes.size()));
  }
  if (reply.status_code() != 0) {
    return absl::Status(static_cast<absl::StatusCode>(reply.status_code()),
                        fmt::format("group memory: {}", reply.text()));
  }
  if (!packet.fd.valid()) {
    return absl::InternalError(fmt::format("{}: a reply without a descriptor", socket_path));
  }
  return MappedMemory::FromFd(std::move(packet.fd), size_bytes);
}

}  // namespace wintserve
