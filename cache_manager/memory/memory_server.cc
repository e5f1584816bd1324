#include "cache_manager/memory/memory_server.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "common/log.h"
#include "common/status_macros.h"
#include "common/token.h"
#include "proto/cache.pb.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kSilentPeerTimeout(2000);
constexpr milliseconds kAcceptRetry(100);
// Beyond, the peer that has been silent longest makes room.
constexpr size_t kMaxPeers = 64;

absl::StatusOr<proto::MemoryRequest> Authenticate(const std::string& token,
                                                  const absl::StatusOr<Packet>& packet) {
  proto::MemoryRequest request;
  if (!packet.ok() || !request.ParseFromString(packet->bytes) ||
      !TokensEqual(token, request.token())) {
    return absl::UnauthenticatedError("the memory socket demands the instance token");
  }
  return request;
}

}  // namespace

absl::StatusOr<std::unique_ptr<MemoryServer>> MemoryServer::Start(const std::string& socket_path,
                                                                  const std::string& token) {
  ::unlink(socket_path.c_str());
  auto listener = ListenUnix(socket_path);
  if (!listener.ok()) return absl::UnavailableError(listener.status().message());
  // AcceptUnix passes over peers of another user and then waits for the next one, which would keep
  // the peers that are already here waiting.
  if (::fcntl(listener->get(), F_SETFL, O_NONBLOCK) != 0) {
    return absl::ErrnoToStatus(errno, "fcntl(O_NONBLOCK) of the memory socket");
  }
  return std::unique_ptr<MemoryServer>(new MemoryServer(socket_path, token, *std::move(listener)));
}

MemoryServer::MemoryServer(std::string socket_path, std::string token, UniqueFd listener)
    : socket_path_(std::move(socket_path)),
      token_(std::move(token)),
      listener_(std::move(listener)),
      thread_([this] { Run(); }) {}

MemoryServer::~MemoryServer() {
  stopping_ = true;
  ::shutdown(listener_.get(), SHUT_RDWR);  // wakes poll
  thread_.join();
  ::unlink(socket_path_.c_str());
}

void MemoryServer::Publish(uint64_t pool_epoch, std::unique_ptr<const PoolMemory> memory) {
  auto pool = std::make_shared<const Pool>(Pool{pool_epoch, std::move(memory)});
  MutexLock lock(&mu_);
  pool_.swap(pool);  // one that is replaced is unmapped after the lock is released
}

std::shared_ptr<const void> MemoryServer::Withdraw() {
  MutexLock lock(&mu_);
  return std::exchange(pool_, nullptr);
}

void MemoryServer::Run() {
  std::vector<Peer> peers;  // oldest first
  auto accept_from = steady_clock::time_point::min();
  while (true) {
    const auto now = steady_clock::now();
    const bool accepting = now >= accept_from;
    std::vector<pollfd> polled = {{accepting ? listener_.get() : -1, POLLIN, 0}};
    for (const Peer& peer : peers) polled.push_back({peer.fd.get(), POLLIN, 0});
    auto wake_up = peers.empty() ? steady_clock::time_point::max() : peers.front().deadline;
    if (!accepting) wake_up = std::min(wake_up, accept_from);
    int timeout_ms = -1;  // for ever
    if (wake_up != steady_clock::time_point::max()) {
      const auto left = std::chrono::ceil<milliseconds>(wake_up - now).count();
      timeout_ms = static_cast<int>(std::max<int64_t>(left, 0));
    }
    if (::poll(polled.data(), polled.size(), timeout_ms) < 0) continue;
    if (stopping_) return;

    ServePeers(polled, &peers);
    if (polled[0].revents == 0) continue;
    const absl::Status accepted = AcceptPeer(&peers);
    if (!accepted.ok() && !absl::IsUnavailable(accepted)) {
      // Out of descriptors, most likely: the waiting peer would wake us again at once.
      if (const auto more = accept_log_.Admit()) {
        LOG_WARNING("memory socket: {}; trying again{}", std::string(accepted.message()), *more);
      }
      accept_from = steady_clock::now() + kAcceptRetry;
    }
  }
}

void MemoryServer::ServePeers(const std::vector<pollfd>& polled, std::vector<Peer>* peers) {
  const auto now = steady_clock::now();
  std::vector<Peer> waiting;
  for (size_t i = 0; i < peers->size(); ++i) {
    Peer& peer = (*peers)[i];
    if (polled[i + 1].revents != 0) {
      Answer(peer.fd.get(), ReceivePacket(peer.fd.get(), /*timeout_ms=*/0));
    } else if (now < peer.deadline) {
      waiting.push_back(std::move(peer));
    } else if (const auto more = stranger_log_.Admit()) {
      LOG_WARNING("memory socket: dropped a peer that said nothing for {} ms{}",
                  kSilentPeerTimeout.count(), *more);
    }
  }
  *peers = std::move(waiting);
}

absl::Status MemoryServer::AcceptPeer(std::vector<Peer>* peers) {
  ASSIGN_OR_RETURN(UniqueFd fd, AcceptUnix(listener_.get()));
  if (peers->size() == kMaxPeers) peers->erase(peers->begin());
  peers->push_back({std::move(fd), steady_clock::now() + kSilentPeerTimeout});
  return absl::OkStatus();
}

void MemoryServer::Answer(int peer_fd, const absl::StatusOr<Packet>& packet) {
  if (absl::IsOutOfRange(packet.status())) return;  // it left without a word
  std::shared_ptr<const Pool> pool;
  {
    MutexLock lock(&mu_);
    pool = pool_;
  }
  const auto find = [&]() -> absl::StatusOr<TierMemory> {
    ASSIGN_OR_RETURN(const proto::MemoryRequest request, Authenticate(token_, packet));
    if (pool == nullptr || pool->epoch != request.pool_epoch()) {
      return absl::NotFoundError(
          fmt::format("pool_epoch {:#x} is not the pool that is open", request.pool_epoch()));
    }
    const auto num_ranks = static_cast<uint32_t>(pool->memory->num_ranks());
    if (request.rank() >= num_ranks) {
      return absl::InvalidArgumentError(fmt::format("rank {} is not in the pool, which has 0 to {}",
                                                    request.rank(), num_ranks - 1));
    }
    const int rank = static_cast<int>(request.rank());
    if (!request.host_tier()) return pool->memory->device_tier(rank);
    if (!pool->memory->has_host_tier()) {
      return absl::FailedPreconditionError("the pool has no host tier (--swap-space is 0)");
    }
    return pool->memory->host_tier(rank);
  };

  proto::MemoryReply reply;
  std::vector<int> fds;
  if (const auto memory = find(); memory.ok()) {
    reply.set_kind(memory->kind == SharedMemory::Kind::kGpu ? proto::MemoryReply::KIND_GPU
                                                            : proto::MemoryReply::KIND_HOST);
    reply.set_size_bytes(memory->size_bytes);
    for (const TierMemory::Part& part : memory->parts) {
      reply.add_part_bytes(part.size_bytes);
      fds.push_back(part.fd);
    }
  } else {
    reply.set_status_code(static_cast<uint32_t>(memory.status().code()));
    reply.set_text(std::string(memory.status().message()));
    LogLimit& limit = absl::IsUnauthenticated(memory.status()) ? stranger_log_ : refusal_log_;
    if (const auto more = limit.Admit()) {
      LOG_WARNING("memory socket: refused a peer: {}{}", reply.text(), *more);
    }
  }
  // The first packet to a peer always finds room, so this does not block.
  if (const absl::Status sent = SendPacket(peer_fd, reply.SerializeAsString(), fds); !sent.ok()) {
    if (const auto more = stranger_log_.Admit()) {
      LOG_WARNING("memory socket: a peer left before its reply: {}{}", std::string(sent.message()),
                  *more);
    }
  }
}

}  // namespace wintserve
