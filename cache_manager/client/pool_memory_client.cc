#include "cache_manager/client/pool_memory_client.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "common/status_macros.h"
#include "common/unix_socket.h"
#include "proto/cache.pb.h"

namespace wintserve {
namespace {

constexpr std::chrono::milliseconds kPauseBetweenTries(5);

absl::StatusOr<PacketWithFds> ExchangeOn(int socket_fd, const std::string& request,
                                         int64_t timeout_ms) {
  RETURN_IF_ERROR(SendPacket(socket_fd, request));
  return ReceivePacketWithFds(socket_fd, timeout_ms);
}

// Sends the request and waits for the reply, again if the peer goes away without one. Whatever goes
// wrong here means that no cache manager is there.
absl::StatusOr<PacketWithFds> Exchange(const std::string& socket_path, const std::string& request,
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
    absl::StatusOr<PacketWithFds> reply = ExchangeOn(socket.get(), request, left_ms());
    if (reply.ok() || absl::IsDeadlineExceeded(reply.status()) || left_ms() == 0) return reply;
    std::this_thread::sleep_for(kPauseBetweenTries);
  }
}

// The sizes of the reply, each with its descriptor.
absl::StatusOr<SharedMemory> ReadMemory(const proto::MemoryReply& reply,
                                        std::vector<UniqueFd> fds) {
  if (reply.kind() != proto::MemoryReply::KIND_HOST &&
      reply.kind() != proto::MemoryReply::KIND_GPU) {
    return absl::InternalError(
        fmt::format("sent memory of kind {}", static_cast<int>(reply.kind())));
  }
  if (fds.empty() || std::ssize(fds) != reply.part_bytes_size()) {
    return absl::InternalError(fmt::format("sent {} descriptors of {} parts of memory", fds.size(),
                                           reply.part_bytes_size()));
  }
  SharedMemory memory = {.kind = reply.kind() == proto::MemoryReply::KIND_GPU
                                     ? SharedMemory::Kind::kGpu
                                     : SharedMemory::Kind::kHost,
                         .size_bytes = static_cast<int64_t>(reply.size_bytes()),
                         .parts = {}};
  constexpr uint64_t kMaxBytes = uint64_t{1} << 62;  // no sum below overflows
  uint64_t total_bytes = 0;
  for (size_t i = 0; i < fds.size(); ++i) {
    const uint64_t part_bytes = reply.part_bytes(static_cast<int>(i));
    if (part_bytes == 0 || part_bytes > kMaxBytes - total_bytes) {
      return absl::InternalError(fmt::format("sent a part of {} bytes of memory", part_bytes));
    }
    total_bytes += part_bytes;
    memory.parts.push_back({std::move(fds[i]), static_cast<int64_t>(part_bytes)});
  }
  if (reply.size_bytes() == 0 || total_bytes < reply.size_bytes()) {
    return absl::InternalError(
        fmt::format("sent {} bytes of memory as {}", total_bytes, reply.size_bytes()));
  }
  return memory;
}

}  // namespace

absl::StatusOr<SharedMemory> FetchPoolMemory(const std::string& socket_path,
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
  absl::StatusOr<SharedMemory> memory = ReadMemory(reply, std::move(packet->fds));
  if (!memory.ok()) {
    return absl::Status(memory.status().code(),
                        fmt::format("{} {}", socket_path, std::string(memory.status().message())));
  }
  return memory;
}

}  // namespace wintserve
