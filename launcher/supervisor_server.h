// The launcher's end of supervisor.sock: hands workers the memory that their rank group reduces in,
// hears from the API server that the cache manager hangs or that an engine worker has to go, tells
// it of every engine worker that has ended; hears from workers how far loading is.
#pragma once

#include <poll.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/log_limit.h"
#include "common/mapped_memory.h"
#include "common/unique_fd.h"
#include "proto/supervisor.pb.h"

namespace wintserve {

// Never blocks: the owner polls. A peer that sends rubbish or does not read is dropped; it costs
// one packet of work a round. Without descriptors for a new peer it waits a moment (kAcceptPause)
// before it looks again; those it has are served meanwhile. Threading: one thread, the launcher's
// poll loop.
class SupervisorServer {
 public:
  // An engine worker that somebody wants ended.
  struct EndRequest {
    int64_t rank = 0;  // as the peer says: of any size
    uint64_t worker_id = 0;
    bool at_fault = false;
  };

  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kAcceptPause{100};
  // How far an engine worker is, as the peer says: of any rank and process.
  struct LoadReport {
    int64_t rank = 0;
    uint64_t worker_id = 0;
    int64_t done_bytes = 0;   // 0..total_bytes
    int64_t total_bytes = 0;  // 1..kMaxLoadBytes
  };
  // Of a rank; sums of as many ranks as there can be fit 64 bits.
  static constexpr int64_t kMaxLoadBytes = int64_t{1} << 50;

  // Listens at `path`. Every request must carry `token`.
  static absl::StatusOr<SupervisorServer> Listen(const std::string& path, std::string token);

  // Appends what the server waits for. When there will be more of it without anybody's doing; the
  // poll must not take longer.
  std::optional<Clock::time_point> AddPollFds(std::vector<pollfd>* fds) const;

  // Serves whatever is ready among `fds`; entries of others are skipped.
  void Serve(const std::vector<pollfd>& fds);

  // Whether somebody has asked for a new cache manager since the last call.
  bool TakeRestartRequest() { return std::exchange(restart_requested_, false); }

  // The ends asked for since the last call, in their order.
  std::vector<EndRequest> TakeEndRequests() { return std::exchange(end_requests_, {}); }

  // What has been told of loading since the last call, at most one of a connection and round.
  std::vector<LoadReport> TakeLoadReports() { return std::exchange(load_reports_, {}); }

  // Tells whoever watches now; whoever comes later never hears of it. A watcher that leaves so much
  // unread that its socket is full is dropped.
  void SendWorkerExit(const proto::WorkerExit& worker_exit);

 private:
  SupervisorServer(UniqueFd listener, std::string token)
      : listener_(std::move(listener)), token_(std::move(token)) {}

  struct Connection {
    UniqueFd fd;
    bool is_known = false;  // has shown the token
    bool watches = false;   // sends WorkerExit there
  };

  // Whether one more peer can be served: there is room, or somebody who has said nothing makes it.
  bool CanAccept() const;
  void Accept();
  void PauseAccepting(const absl::Status& reason);
  bool ServeConnection(Connection* connection);  // false: drop it
  // The descriptor that goes with the reply, or -1.
  absl::StatusOr<int> Answer(const proto::SupervisorRequest& request);
  absl::StatusOr<int> GroupMemoryFd(uint64_t group_epoch, uint64_t size_bytes);
  absl::Status KeepLoadReport(const proto::LoadProgress& progress);

  UniqueFd listener_;
  std::string token_;
  std::vector<Connection> connections_;
  std::optional<Clock::time_point> accept_from_;  // the last accept has failed
  // A new epoch ends the one before; workers keep their own mapping of it.
  std::optional<uint64_t> group_epoch_;
  MappedMemory group_memory_;
  std::deque<uint64_t> ended_epochs_;
  bool restart_requested_ = false;
  std::vector<EndRequest> end_requests_;
  std::vector<LoadReport> load_reports_;
  // By pointer, so that the server can be moved.
  std::unique_ptr<LogLimit> stranger_log_ = std::make_unique<LogLimit>();
  std::unique_ptr<LogLimit> accept_log_ = std::make_unique<LogLimit>();
};

}  // namespace wintserve
