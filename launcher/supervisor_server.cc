#include "launcher/supervisor_server.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>

#include "common/log.h"
#include "common/status_macros.h"
#include "common/token.h"
#include "common/unix_socket.h"
#include "proto/supervisor.pb.h"

namespace wintserve {
namespace {

constexpr size_t kMaxConnections = 64;
constexpr size_t kMaxEndedEpochs = 64;
constexpr uint64_t kMaxGroupMemoryBytes = uint64_t{1} << 30;

absl::Status SetNonBlocking(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) {
    return absl::ErrnoToStatus(errno, "fcntl");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SupervisorServer> SupervisorServer::Listen(const std::string& path,
                                                          std::string token) {
  ASSIGN_OR_RETURN(UniqueFd listener, ListenUnix(path));
  RETURN_IF_ERROR(SetNonBlocking(listener.get()));
  return SupervisorServer(std::move(listener), std::move(token));
}

std::optional<SupervisorServer::Clock::time_point> SupervisorServer::AddPollFds(
    std::vector<pollfd>* fds) const {
  for (const Connection& connection : connections_) {
    fds->push_back({connection.fd.get(), POLLIN, 0});
  }
  if (accept_from_.has_value() && Clock::now() < *accept_from_) return accept_from_;
  // Others wait in the backlog.
  if (CanAccept()) fds->push_back({listener_.get(), POLLIN, 0});
  return std::nullopt;
}

void SupervisorServer::Serve(const std::vector<pollfd>& fds) {
  for (const pollfd& ready : fds) {
    if (ready.revents == 0) continue;
    const auto connection =
        std::find_if(connections_.begin(), connections_.end(),
                     [&](const Connection& open) { return open.fd.get() == ready.fd; });
    if (connection != connections_.end() && !ServeConnection(&*connection)) {
      connections_.erase(connection);
    }
  }
  // Last, so that a number just closed is not taken for the new peer's.
  for (const pollfd& ready : fds) {
    if (ready.revents != 0 && ready.fd == listener_.get()) Accept();
  }
}

bool SupervisorServer::CanAccept() const {
  return connections_.size() < kMaxConnections ||
         !std::ranges::all_of(connections_, &Connection::is_known);
}

void SupervisorServer::Accept() {
  if (!CanAccept()) return;
  absl::StatusOr<UniqueFd> connection = AcceptUnix(listener_.get());
  if (absl::IsUnavailable(connection.status())) return;  // it has left, or is of another user
  if (!connection.ok()) return PauseAccepting(connection.status());
  if (std::exchange(accept_from_, std::nullopt).has_value()) {
    LOG_INFO("supervisor.sock: accepts connections again");
  }
  if (connections_.size() == kMaxConnections) {
    connections_.erase(
        std::ranges::find(connections_, false, &Connection::is_known));  // the oldest
  }
  if (SetNonBlocking(connection->get()).ok()) connections_.push_back({*std::move(connection)});
}

// Out of descriptors, most likely: the peer that waits would wake us again at once, for ever.
void SupervisorServer::PauseAccepting(const absl::Status& reason) {
  const bool is_news = !accept_from_.has_value();
  accept_from_ = Clock::now() + kAcceptPause;
  if (!is_news) return;
  if (const auto more = accept_log_->Admit()) {
    LOG_WARNING("supervisor.sock: cannot accept a connection: {}; trying again every {} ms{}",
                std::string(reason.message()), kAcceptPause.count(), *more);
  }
}

void SupervisorServer::SendWorkerExit(const proto::WorkerExit& worker_exit) {
  const std::string bytes = worker_exit.SerializeAsString();
  std::erase_if(connections_, [&](const Connection& connection) {
    if (!connection.watches) return false;
    const absl::Status status = SendPacket(connection.fd.get(), bytes);
    if (!status.ok()) {
      LOG_WARNING("supervisor.sock: dropped a watcher that does not read: {}",
                  std::string(status.message()));
    }
    return !status.ok();
  });
}

bool SupervisorServer::ServeConnection(Connection* connection) {
  const absl::StatusOr<Packet> packet = ReceivePacket(connection->fd.get(), 0);
  if (!packet.ok()) return absl::IsDeadlineExceeded(packet.status());
  proto::SupervisorRequest request;
  if (!request.ParseFromString(packet->bytes) || !TokensEqual(token_, request.token())) {
    if (const auto more = stranger_log_->Admit()) {
      LOG_WARNING("supervisor.sock: dropped a peer without the instance's token{}", *more);
    }
    return false;
  }
  connection->is_known = true;
  if (request.has_watch_workers()) connection->watches = true;
  const absl::StatusOr<int> fd = Answer(request);
  proto::SupervisorReply reply;
  reply.set_status_code(static_cast<uint32_t>(fd.status().code()));
  // Never empty: a packet without bytes would read as the end of the connection.
  reply.set_text(fd.ok() ? "ok" : std::string(fd.status().message()));
  return SendPacket(connection->fd.get(), reply.SerializeAsString(), fd.ok() ? *fd : -1).ok();
}

absl::StatusOr<int> SupervisorServer::Answer(const proto::SupervisorRequest& request) {
  switch (request.request_case()) {
    case proto::SupervisorRequest::kGroupMemory:
      return GroupMemoryFd(request.group_memory().group_epoch(),
                           request.group_memory().size_bytes());
    case proto::SupervisorRequest::kRestartCacheManager:
      restart_requested_ = true;
      return -1;
    case proto::SupervisorRequest::kEndWorker:
      end_requests_.push_back({.rank = request.end_worker().rank(),
                               .worker_id = request.end_worker().worker_id(),
                               .at_fault = request.end_worker().at_fault()});
      return -1;
    case proto::SupervisorRequest::kWatchWorkers:
      return -1;
    case proto::SupervisorRequest::kLoadProgress:
      RETURN_IF_ERROR(KeepLoadReport(request.load_progress()));
      return -1;
    case proto::SupervisorRequest::REQUEST_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("unknown request");
}

absl::StatusOr<int> SupervisorServer::GroupMemoryFd(uint64_t group_epoch, uint64_t size_bytes) {
  if (size_bytes == 0 || size_bytes > kMaxGroupMemoryBytes) {
    return absl::InvalidArgumentError(
        fmt::format("size_bytes: must be 1..{} (got {})", kMaxGroupMemoryBytes, size_bytes));
  }
  if (group_epoch_ == group_epoch) {
    if (static_cast<uint64_t>(group_memory_.size_bytes()) != size_bytes) {
      return absl::InvalidArgumentError(
          fmt::format("size_bytes: another rank of epoch {:#x} asked for {} (got {})", group_epoch,
                      group_memory_.size_bytes(), size_bytes));
    }
    return group_memory_.fd();
  }
  if (std::find(ended_epochs_.begin(), ended_epochs_.end(), group_epoch) != ended_epochs_.end()) {
    return absl::FailedPreconditionError(fmt::format("epoch {:#x} has ended", group_epoch));
  }
  ASSIGN_OR_RETURN(MappedMemory memory,
                   MappedMemory::Create("wintserve-group", static_cast<int64_t>(size_bytes)));
  if (group_epoch_.has_value()) ended_epochs_.push_back(*group_epoch_);
  if (ended_epochs_.size() > kMaxEndedEpochs) ended_epochs_.pop_front();
  group_memory_ = std::move(memory);
  group_epoch_ = group_epoch;
  return group_memory_.fd();
}

absl::Status SupervisorServer::KeepLoadReport(const proto::LoadProgress& progress) {
  if (progress.total_bytes() == 0 ||
      progress.total_bytes() > static_cast<uint64_t>(kMaxLoadBytes)) {
    return absl::InvalidArgumentError(
        fmt::format("total_bytes: must be 1..{} (got {})", kMaxLoadBytes, progress.total_bytes()));
  }
  if (progress.done_bytes() > progress.total_bytes()) {
    return absl::InvalidArgumentError(fmt::format("done_bytes: must be 0..{}, total_bytes (got {})",
                                                  progress.total_bytes(), progress.done_bytes()));
  }
  load_reports_.push_back({.rank = progress.rank(),
                           .worker_id = progress.worker_id(),
                           .done_bytes = static_cast<int64_t>(progress.done_bytes()),
                           .total_bytes = static_cast<int64_t>(progress.total_bytes())});
  return absl::OkStatus();
}

}  // namespace wintserve
