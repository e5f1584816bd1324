// One packet to the launcher's socket.
#include <sys/socket.h>

#include <string>
#include <vector>

#include "common/check.h"
#include "common/unix_socket.h"
#include "launcher/supervisor_server.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"

namespace wintserve {
namespace {

constexpr char kToken[] = "token";

void ServeWhatIsReady(SupervisorServer* server) {
  std::vector<pollfd> fds;
  server->AddPollFds(&fds);
  CHECK(::poll(fds.data(), fds.size(), 0) >= 0);
  server->Serve(fds);
}

}  // namespace

void FuzzInput(std::string_view input) {
  static const InputDir dir;
  const std::string path = dir.path() / "supervisor.sock";
  ::unlink(path.c_str());
  auto server = SupervisorServer::Listen(path, kToken);
  CHECK(server.ok(), "{}", server.status().ToString());
  const auto peer = ConnectUnix(path, 1000);
  CHECK(peer.ok());
  ServeWhatIsReady(&*server);  // accepts
  // Larger ones cannot be sent.
  CHECK(SendPacket(peer->get(), std::string(input.substr(0, kMaxPacketBytes))).ok());
  ServeWhatIsReady(&*server);

  proto::SupervisorRequest request;
  const bool is_ours =
      !input.empty() && request.ParseFromString(std::string(input)) && request.token() == kToken;
  // Whatever it says, sums of it do not overflow, and nothing is kept of a stranger's.
  const std::vector<SupervisorServer::LoadReport> loads = server->TakeLoadReports();
  for (const SupervisorServer::LoadReport& load : loads) {
    CHECK(0 <= load.done_bytes && load.done_bytes <= load.total_bytes);
    CHECK(0 < load.total_bytes && load.total_bytes <= SupervisorServer::kMaxLoadBytes);
  }
  const auto reply_packet = ReceivePacket(peer->get(), /*timeout_ms=*/0);
  if (!is_ours) {
    // Dropped without a word.
    CHECK(loads.empty());
    CHECK(absl::IsOutOfRange(reply_packet.status()), "{}", reply_packet.status().ToString());
    return;
  }
  proto::SupervisorReply reply;
  CHECK(reply_packet.ok() && reply.ParseFromString(reply_packet->bytes));
  CHECK(!reply.text().empty());
  CHECK(loads.size() == (request.has_load_progress() && reply.status_code() == 0 ? 1u : 0u));
  const bool got_memory = reply_packet->fd.valid();
  CHECK(got_memory == (reply.status_code() == 0 && request.has_group_memory()));
}

}  // namespace wintserve
