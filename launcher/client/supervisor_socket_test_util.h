// For tests: a launcher's socket, served by hand from the test's thread.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>

#include "common/temp_dir_test_util.h"
#include "common/unique_fd.h"
#include "common/unix_socket.h"
#include "proto/supervisor.pb.h"

namespace wintserve {

class TestSupervisorSocket {
 public:
  static constexpr char kToken[] = "secret";

  std::string path() const { return (directory_.path() / "supervisor.sock").string(); }
  void Listen() {
    auto listener = ListenUnix(path());
    ASSERT_TRUE(listener.ok()) << listener.status();
    listener_ = *std::move(listener);
  }
  // Nobody can connect any more.
  void Close() { listener_.Reset(); }

  // The next connection and what it asks for, answered with that.
  std::pair<UniqueFd, proto::SupervisorRequest> Serve(uint32_t status_code = 0) {
    auto peer = AcceptUnix(listener_.get());
    EXPECT_TRUE(peer.ok()) << peer.status();
    const auto packet = ReceivePacket(peer->get(), /*timeout_ms=*/60'000);
    EXPECT_TRUE(packet.ok()) << packet.status();
    proto::SupervisorRequest request;
    EXPECT_TRUE(request.ParseFromString(packet->bytes));
    EXPECT_EQ(request.token(), kToken);
    proto::SupervisorReply reply;
    reply.set_status_code(status_code);
    reply.set_text(status_code == 0 ? "ok" : "a reason");
    // On a slow machine who asks may have given up by now.
    (void)SendPacket(peer->get(), reply.SerializeAsString());
    return {*std::move(peer), request};
  }
  bool SomebodyCalls(std::chrono::milliseconds within) const {
    pollfd wait = {listener_.get(), POLLIN, 0};
    return ::poll(&wait, 1, static_cast<int>(within.count())) > 0;
  }

 private:
  const TempDir directory_;
  UniqueFd listener_;
};

}  // namespace wintserve
