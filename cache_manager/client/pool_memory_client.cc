#include "cache_manager/client/pool_memory_client.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "common/status_macros.h"
#include "common/unix_socket.h"
#include "proto/cache.pb.h"

namespace wintserve {
namespace {

// Sends the request and waits for the reply. Whatever goes wrong here means that no cache manager
// is there.
absl::StatusOr<Packet> Exchange(const std::string& socket_path, const std::string& request,
                                int64_t timeout_ms) {
  using std::chrono::steady_clock;
  const auto deadline = steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  ASSIGN_OR_RETURN(const UniqueFd socket, ConnectUnix(socket_path, timeout_ms));
  RETURN_IF_ERROR(SendPacket(socket.get(), request));
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(deadline - steady_clock::now());
  return ReceivePacket(socket.get(), std::max<int64_t>(left.count(), 0));
}

}  // namespace

absl::StatusOr<MappedMemory> FetchPoolMemory(const std::string& socket_path,
                                             const std::string& token, uint64_t pool_epoch,
                                             int rank, int64_t timeout_ms) {
  proto::MemoryRequest request;
  request.set_token(token);
  request.set_pool_epoch(pool_epoch);
  request.set_rank(static_cast<uint32_t>(rank));
  auto packet = Exchange(socket_path, request.SerializeAsString(), timeout_ms);
  if (!packet.ok()) {
    return absl::UnavailableError(fmt::format("no KV pool memory from {}: {}", socket_path,
                                              std::string(packet.status().message())));
  }
  proto::MemoryReply reply;
  if (!reply.ParseFromString(packet->bytes)) {
    return absl::InternalError(fmt::format("{} sent no MemoryReply", socket_path));
  }
  if (reply.status_code() != 0) {
    return absl::Status(static_cast<absl::StatusCode>(reply.status_code()),
                        fmt::format("no KV pool memory from {}: {}", socket_path, reply.text()));
  }
  if (!packet->fd.valid()) {
    return absl::InternalError(fmt::format("{} sent no descriptor", socket_path));
  }
  return MappedMemory::FromFd(std::move(packet->fd), static_cast<int64_t>(reply.size_bytes()));
}

}  // namespace wintserve
