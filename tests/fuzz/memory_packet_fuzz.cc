// One packet to the cache manager's memory socket.
#include <string>

#include "cache_manager/memory/host_pool_memory.h"
#include "cache_manager/memory/memory_server.h"
#include "common/check.h"
#include "common/unix_socket.h"
#include "proto/cache.pb.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"

namespace wintserve {
namespace {

constexpr char kToken[] = "token";
constexpr uint64_t kPoolEpoch = 7;

// With a pool of two ranks.
const std::string& SocketPath() {
  static const InputDir* const dir = new InputDir;
  static MemoryServer* const server = [] {
    auto started = MemoryServer::Start(dir->path() / "memory.sock", kToken);
    CHECK(started.ok(), "{}", started.status().ToString());
    auto memory = HostPoolMemory::Create(
        {.num_blocks = 4, .block_bytes_by_rank = {4096, 4096}, .num_host_slots = 2},
        /*available_bytes=*/int64_t{1} << 30);
    CHECK(memory.ok(), "{}", memory.status().ToString());
    (*started)->Publish(kPoolEpoch, *std::move(memory));
    return started->release();
  }();
  return server->socket_path();
}

}  // namespace

void FuzzInput(std::string_view input) {
  if (input.empty()) return;  // reads as the end of the connection
  const auto peer = ConnectUnix(SocketPath(), 5000);
  CHECK(peer.ok(), "{}", peer.status().ToString());
  const std::string bytes(input.substr(0, kMaxPacketBytes));
  CHECK(SendPacket(peer->get(), bytes).ok());
  const auto packet = ReceivePacketWithFds(peer->get(), /*timeout_ms=*/5000);
  proto::MemoryReply reply;
  CHECK(packet.ok() && reply.ParseFromString(packet->bytes), "{}", packet.status().ToString());
  proto::MemoryRequest request;
  const bool is_ours = request.ParseFromString(bytes) && request.token() == kToken;
  const auto unauthenticated = static_cast<uint32_t>(absl::StatusCode::kUnauthenticated);
  CHECK(is_ours == (reply.status_code() != unauthenticated), "{}", reply.text());
  const bool exists = is_ours && request.pool_epoch() == kPoolEpoch && request.rank() < 2;
  CHECK(exists == (reply.status_code() == 0), "{}", reply.text());
  CHECK(packet->fds.size() == static_cast<size_t>(reply.part_bytes_size()));
  CHECK(packet->fds.empty() != exists);
}

}  // namespace wintserve
