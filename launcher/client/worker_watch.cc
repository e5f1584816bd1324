#include "launcher/client/worker_watch.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "common/unix_socket.h"
#include "launcher/client/supervisor_client.h"
#include "proto/supervisor.pb.h"

namespace wintserve {
namespace {

constexpr int64_t kRequestTimeoutMs = 2'000;
constexpr int64_t kPauseBetweenTriesMs = 200;
constexpr int64_t kForeverMs = -1;

std::string TextOf(const absl::Status& status) { return std::string(status.message()); }

absl::StatusOr<WorkerExitNotice> ParseExit(const std::string& bytes) {
  proto::WorkerExit message;
  if (!message.ParseFromString(bytes) || message.worker_id() == 0) {
    return absl::InternalError(fmt::format("{} bytes that are no WorkerExit", bytes.size()));
  }
  return WorkerExitNotice{.rank = message.rank(),
                          .worker_id = message.worker_id(),
                          .signal = message.signal(),
                          .code = message.code(),
                          .kv_trusted = message.kv_trusted()};
}

}  // namespace

WorkerWatch::WorkerWatch(std::string socket_path, std::string token, WorkerWatchEvents events)
    : socket_path_(std::move(socket_path)),
      token_(std::move(token)),
      events_(std::move(events)),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  CHECK(wake_.get() >= 0, "eventfd: errno {}", errno);
  thread_ = std::thread([this] { Run(); });
}

WorkerWatch::~WorkerWatch() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
  }
  ::eventfd_write(wake_.get(), 1);
  thread_.join();
}

void WorkerWatch::EndWorker(uint32_t rank, uint64_t worker_id, bool at_fault) {
  {
    MutexLock lock(&mutex_);
    orders_.push_back({rank, worker_id, at_fault});
  }
  ::eventfd_write(wake_.get(), 1);
}

bool WorkerWatch::stopping() {
  MutexLock lock(&mutex_);
  return stopping_;
}

void WorkerWatch::Run() {
  while (!stopping()) {
    const absl::Status lost = Watch();
    if (stopping()) return;
    LOG_DEBUG("the launcher is out of reach: {}", TextOf(lost));
    WaitForPacket(/*fd=*/-1, kPauseBetweenTriesMs);
  }
}

absl::Status WorkerWatch::Watch() {
  ASSIGN_OR_RETURN(const UniqueFd socket, ConnectUnix(socket_path_, kPauseBetweenTriesMs));
  proto::SupervisorRequest request;
  request.set_token(token_);
  request.mutable_watch_workers();
  RETURN_IF_ERROR(SendPacket(socket.get(), request.SerializeAsString()));
  ASSIGN_OR_RETURN(const Packet packet, ReceivePacket(socket.get(), kRequestTimeoutMs));
  proto::SupervisorReply reply;
  if (!reply.ParseFromString(packet.bytes) || reply.status_code() != 0) {
    return absl::InternalError(fmt::format("it refuses to tell exits: {}", reply.text()));
  }
  events_.on_watching(true);
  absl::Status lost;
  while (lost.ok() && WaitForPacket(socket.get(), kForeverMs)) {
    const absl::StatusOr<Packet> exit = ReceivePacket(socket.get(), kRequestTimeoutMs);
    const absl::StatusOr<WorkerExitNotice> notice =
        exit.ok() ? ParseExit(exit->bytes) : exit.status();
    if (notice.ok()) events_.on_exit(*notice);
    lost = notice.status();
  }
  if (!stopping()) events_.on_watching(false);
  return lost;
}

bool WorkerWatch::WaitForPacket(int fd, int64_t timeout_ms) {
  while (!stopping()) {
    pollfd fds[] = {{.fd = wake_.get(), .events = POLLIN, .revents = 0},
                    {.fd = fd, .events = POLLIN, .revents = 0}};
    const int num_ready = ::poll(fds, 2, static_cast<int>(timeout_ms));
    if (num_ready < 0 && errno != EINTR) return false;
    if (num_ready == 0) return false;
    if (fds[0].revents != 0) {
      eventfd_t count = 0;
      ::eventfd_read(wake_.get(), &count);
      SendOrders();
    }
    if (fds[1].revents != 0) return true;
  }
  return false;
}

void WorkerWatch::SendOrders() {
  std::vector<Order> orders;
  {
    MutexLock lock(&mutex_);
    orders.swap(orders_);
    if (stopping_) return;
  }
  for (const auto& [rank, worker_id, at_fault] : orders) {
    const absl::Status status =
        RequestEndOfWorker(socket_path_, token_, rank, worker_id, at_fault, kRequestTimeoutMs);
    if (!status.ok()) LOG_WARNING("engine worker {} is not ended: {}", rank, TextOf(status));
  }
}

}  // namespace wintserve
