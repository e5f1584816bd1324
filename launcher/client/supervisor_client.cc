#include "launcher/client/supervisor_client.h"

#include <fmt/format.h>

#include "common/status_macros.h"
#include "common/unix_socket.h"
#include "proto/supervisor.pb.h"

namespace wintserve {
namespace {

absl::StatusOr<Packet> Exchange(const std::string& socket_path, const std::string& request,
                                int64_t timeout_ms) {
  ASSIGN_OR_RETURN(const UniqueFd socket, ConnectUnix(socket_path, timeout_ms));
  RETURN_IF_ERROR(SendPacket(socket.get(), request));
  return ReceivePacket(socket.get(), timeout_ms);
}

absl::Status Ask(const std::string& socket_path, const proto::SupervisorRequest& request,
                 int64_t timeout_ms) {
  const auto packet = Exchange(socket_path, request.SerializeAsString(), timeout_ms);
  if (!packet.ok()) {
    return absl::UnavailableError(
        fmt::format("no launcher at {}: {}", socket_path, std::string(packet.status().message())));
  }
  proto::SupervisorReply reply;
  if (!reply.ParseFromString(packet->bytes)) {
    return absl::InternalError(
        fmt::format("{}: {} bytes that are no reply", socket_path, packet->bytes.size()));
  }
  return absl::Status(static_cast<absl::StatusCode>(reply.status_code()),
                      reply.status_code() == 0 ? "" : reply.text());
}

}  // namespace

absl::Status RequestCacheManagerRestart(const std::string& socket_path, const std::string& token,
                                        int64_t timeout_ms) {
  proto::SupervisorRequest request;
  request.set_token(token);
  request.mutable_restart_cache_manager();
  return Ask(socket_path, request, timeout_ms);
}

absl::Status RequestEndOfWorker(const std::string& socket_path, const std::string& token,
                                uint32_t rank, uint64_t worker_id, bool at_fault,
                                int64_t timeout_ms) {
  proto::SupervisorRequest request;
  request.set_token(token);
  request.mutable_end_worker()->set_rank(rank);
  request.mutable_end_worker()->set_worker_id(worker_id);
  request.mutable_end_worker()->set_at_fault(at_fault);
  return Ask(socket_path, request, timeout_ms);
}

absl::Status TellLoadProgress(const std::string& socket_path, const std::string& token,
                              const LoadProgressNotice& notice, int64_t timeout_ms) {
  proto::SupervisorRequest request;
  request.set_token(token);
  proto::LoadProgress& progress = *request.mutable_load_progress();
  progress.set_rank(notice.rank);
  progress.set_worker_id(notice.worker_id);
  progress.set_done_bytes(static_cast<uint64_t>(notice.done_bytes));
  progress.set_total_bytes(static_cast<uint64_t>(notice.total_bytes));
  return Ask(socket_path, request, timeout_ms);
}

}  // namespace wintserve
