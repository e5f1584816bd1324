#include "cache_manager/client/pool_memory_client.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "common/status_macros.h"
#include "common/unix_socket.h"
#include "proto/cache.pb.h"

namespace wintserve {
namespace {

constexpr std::chrono::milliseconds kPauseBetweenTries(5);

absl::StatusOr<Packet> ExchangeOn(int socket_fd, const std::string& request, int64_t timeout_ms) {
  RETURN_IF_ERROR(SendPacket(socket_fd, request));
  return ReceivePacket(socket_fd, timeout_ms);
}

// Sends the request and waits for the reply, again if the peer goes away without one. Whatever goes
// wrong here means that no cache manager is there.
absl::StatusOr<Packet> Exchange(const std::string& socket_path, const std::string& request,
                                int64_t timeout_ms) {
  using std::chrono::steady_clock;
  const auto deadline = steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  const auto left_ms = [deadline] {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - steady_clock::now());
    return std::max<int64_t>(left.count(), 0);
  };
  while (true) {
    ASSIGN_OR_RETURN(const UniqueFd socket, ConnectUnix(socket_path, left_ms()));
    absl::StatusOr<Packet> reply = ExchangeOn(socket.get(), request, left_ms());
    if (reply.ok() || absl::IsDeadlineExceeded(reply.status()) || left_ms() == 0) return reply;
    std::this_thread::sleep_for(kPauseBetweenTries);
  }
}

}  // namespace

absl::StatusOr<MappedMemory> FetchPoolMemory(const std::string& socket_path,
                                             const std::string& token, uint64_t pool_epoch,
                                             int rank, PoolTier tier, int64_t timeout_ms) {
  proto::MemoryRequest request;
  request.set_token(token);
  request.set_pool_epoch(pool_epoch);
  request.set_rank(static_cast<uint32_t>(rank));
  request.set_host_tier(tier == PoolTier::kHost);
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
  ASSIGN_OR_RETURN(
      MappedMemory memory,
      MappedMemory::FromFd(std::move(packet->fd), static_cast<int64_t>(reply.size_bytes())));
  ::madvise(memory.data(), memory.size_bytes(), MADV_DONTDUMP);  // without it dumps are larger
  return memory;
}

}  // namespace wintserve
