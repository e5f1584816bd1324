#include "engine_worker/collectives/shm/group_memory.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <thread>

#include "common/check.h"
#include "common/unix_socket.h"
#include "proto/supervisor.pb.h"

namespace wintserve {
namespace {

using testing::HasSubstr;

// Answers one request with what the test prepared, and keeps the request.
class FakeSupervisor {
 public:
  FakeSupervisor(proto::SupervisorReply reply, int fd) {
    auto listener = ListenUnix(path_);
    CHECK(listener.ok(), "{}", listener.status().ToString());
    listener_ = *std::move(listener);
    thread_ = std::thread([this, reply, fd] {
      auto peer = AcceptUnix(listener_.get());
      CHECK(peer.ok());
      auto packet = ReceivePacket(peer->get(), 5000);
      CHECK(packet.ok() && request_.ParseFromString(packet->bytes));
      CHECK(SendPacket(peer->get(), reply.SerializeAsString(), fd).ok());
    });
  }
  ~FakeSupervisor() {
    Join();
    ::unlink(path_.c_str());
  }
  void Join() {
    if (thread_.joinable()) thread_.join();
  }
  const std::string& path() const { return path_; }
  const proto::SupervisorRequest& request() const { return request_; }

 private:
  const std::string path_ = fmt::format("{}/supervisor.{}.sock", testing::TempDir(), ::getpid());
  UniqueFd listener_;
  proto::SupervisorRequest request_;
  std::thread thread_;
};

TEST(FetchGroupMemory, MapsTheMemoryThatTheSupervisorHandsOut) {
  auto memory = MappedMemory::Create("group", 8192);
  ASSERT_TRUE(memory.ok());
  FakeSupervisor supervisor({}, memory->fd());
  const auto fetched = FetchGroupMemory(supervisor.path(), "secret", 5, 8192, 5000);
  ASSERT_TRUE(fetched.ok()) << fetched.status();
  static_cast<char*>(memory->data())[100] = 'x';
  EXPECT_EQ(static_cast<char*>(fetched->data())[100], 'x');
  supervisor.Join();
  EXPECT_EQ(supervisor.request().token(), "secret");
  EXPECT_EQ(supervisor.request().group_memory().group_epoch(), 5);
  EXPECT_EQ(supervisor.request().group_memory().size_bytes(), 8192);
}

TEST(FetchGroupMemory, RefusesMemoryOfAnotherSize) {
  auto memory = MappedMemory::Create("group", 4096);
  ASSERT_TRUE(memory.ok());
  FakeSupervisor supervisor({}, memory->fd());
  const auto fetched = FetchGroupMemory(supervisor.path(), "secret", 5, 8192, 5000);
  EXPECT_EQ(fetched.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(fetched.status().message(), HasSubstr("has 4096 bytes, expected 8192"));
}

TEST(FetchGroupMemory, PassesOnTheSupervisorsRefusal) {
  proto::SupervisorReply refusal;
  refusal.set_status_code(static_cast<int>(absl::StatusCode::kPermissionDenied));
  refusal.set_text("wrong token");
  FakeSupervisor supervisor(refusal, -1);
  const auto fetched = FetchGroupMemory(supervisor.path(), "guess", 5, 8192, 5000);
  EXPECT_EQ(fetched.status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(fetched.status().message(), HasSubstr("wrong token"));
}

TEST(FetchGroupMemory, RefusesAReplyWithoutADescriptor) {
  proto::SupervisorReply reply;
  reply.set_text("here you are");
  FakeSupervisor supervisor(reply, -1);
  EXPECT_EQ(FetchGroupMemory(supervisor.path(), "secret", 5, 8192, 5000).status().code(),
            absl::StatusCode::kInternal);
}

TEST(FetchGroupMemory, GivesUpWhenNobodyListens) {
  EXPECT_EQ(FetchGroupMemory("/nonexistent/supervisor.sock", "secret", 5, 8192, 20).status().code(),
            absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace wintserve
