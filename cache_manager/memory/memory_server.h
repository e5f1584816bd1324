// The memory socket: hands the pool's shared memory to the workers of this instance.
#pragma once

#include <poll.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "cache_manager/memory/pool_memory.h"
#include "common/log_limit.h"
#include "common/mutex.h"
#include "common/unique_fd.h"
#include "common/unix_socket.h"

namespace wintserve {

// One MemoryRequest a connection, answered by one MemoryReply (proto/cache.proto). A peer without
// the token is told UNAUTHENTICATED in the same words whatever it sent, so it learns nothing; one
// that says nothing is dropped after a while and keeps nobody waiting. Threading: any thread; one
// thread of its own serves all connections.
class MemoryServer {
 public:
  // Listens at socket_path; a socket that a dead cache manager has left there is replaced.
  // UNAVAILABLE: cannot listen there.
  static absl::StatusOr<std::unique_ptr<MemoryServer>> Start(const std::string& socket_path,
                                                             const std::string& token);
  // Stops serving and unlinks the socket.
  ~MemoryServer();
  MemoryServer(const MemoryServer&) = delete;
  MemoryServer& operator=(const MemoryServer&) = delete;

  const std::string& socket_path() const { return socket_path_; }

  // From now on requests that name pool_epoch get this memory, and no others get any.
  void Publish(uint64_t pool_epoch, std::unique_ptr<const PoolMemory> memory) EXCLUDES(mu_);
  // Hands out no memory from now on. What is returned (null: there was none) owns what was
  // published: it is freed once that is released and no worker maps it any more. Releasing it takes
  // long, as gigabytes are unmapped, so the caller chooses where.
  std::shared_ptr<const void> Withdraw() EXCLUDES(mu_);

 private:
  struct Pool {
    uint64_t epoch;
    std::unique_ptr<const PoolMemory> memory;
  };
  struct Peer {
    UniqueFd fd;
    std::chrono::steady_clock::time_point deadline;  // for its request
  };

  MemoryServer(std::string socket_path, std::string token, UniqueFd listener);

  void Run();
  // Answers the peers that have spoken and drops those that have said nothing in time.
  void ServePeers(const std::vector<pollfd>& polled, std::vector<Peer>* peers);
  absl::Status AcceptPeer(std::vector<Peer>* peers);
  // Sends a connection's one reply.
  void Answer(int peer_fd, const absl::StatusOr<Packet>& packet) EXCLUDES(mu_);

  const std::string socket_path_;
  const std::string token_;
  const UniqueFd listener_;
  std::atomic<bool> stopping_ = false;
  Mutex mu_;
  std::shared_ptr<const Pool> pool_ GUARDED_BY(mu_);  // null: none. A reply under way shares it.
  LogLimit accept_log_;
  LogLimit stranger_log_;  // peers that have not shown the token
  LogLimit refusal_log_;   // those that have
  std::thread thread_;
};

}  // namespace wintserve
