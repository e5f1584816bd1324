#include "common/unix_socket.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>
#include <vector>

namespace wintserve {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kPatienceMs = 20'000;

class UnixSocketTest : public testing::Test {
 protected:
  ~UnixSocketTest() override { ::unlink(path_.c_str()); }

  void Listen() {
    auto listener = ListenUnix(path_);
    ASSERT_TRUE(listener.ok()) << listener.status();
    listener_ = *std::move(listener);
  }

  // Connects until nobody can. The first connection that fails ends it.
  absl::Status FillBacklog() {
    while (waiting_.size() < 10'000) {
      auto peer = ConnectUnix(path_, /*timeout_ms=*/0);
      if (!peer.ok()) return peer.status();
      waiting_.push_back(*std::move(peer));
    }
    return absl::OkStatus();
  }

  const std::string path_ =
      (std::filesystem::path(testing::TempDir()) / fmt::format("unix_socket_test_{}", ::getpid()))
          .string();
  UniqueFd listener_;
  std::vector<UniqueFd> waiting_;
};

bool IsBlocking(const UniqueFd& fd) { return (::fcntl(fd.get(), F_GETFL) & O_NONBLOCK) == 0; }

TEST_F(UnixSocketTest, ConnectGivesUpInTimeWhenTheBacklogIsFull) {
  Listen();
  EXPECT_EQ(FillBacklog().code(), absl::StatusCode::kUnavailable);
  ASSERT_FALSE(waiting_.empty());
  const auto start = std::chrono::steady_clock::now();
  const auto peer = ConnectUnix(path_, /*timeout_ms=*/50);
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(50));
  EXPECT_EQ(peer.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(peer.status().message()), HasSubstr("cannot connect to " + path_));
}

TEST_F(UnixSocketTest, ConnectWaitsForAPlaceInTheBacklog) {
  Listen();
  EXPECT_EQ(FillBacklog().code(), absl::StatusCode::kUnavailable);
  absl::StatusOr<UniqueFd> late = absl::UnknownError("not connected");
  std::thread connecting([&] { late = ConnectUnix(path_, kPatienceMs); });
  const auto accepted = AcceptUnix(listener_.get());
  connecting.join();
  EXPECT_TRUE(accepted.ok()) << accepted.status();
  EXPECT_TRUE(late.ok()) << late.status();
}

TEST_F(UnixSocketTest, ConnectWaitsForAPeerThatIsStillStarting) {
  absl::StatusOr<UniqueFd> early = absl::UnknownError("not connected");
  std::thread connecting([&] { early = ConnectUnix(path_, kPatienceMs); });
  Listen();
  connecting.join();
  EXPECT_TRUE(early.ok()) << early.status();
}

TEST_F(UnixSocketTest, BothEndsBlock) {
  Listen();
  ASSERT_EQ(::fcntl(listener_.get(), F_SETFL, O_NONBLOCK), 0);
  const auto client = ConnectUnix(path_, kPatienceMs);
  ASSERT_TRUE(client.ok()) << client.status();
  const auto server = AcceptUnix(listener_.get());
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_TRUE(IsBlocking(*client));
  EXPECT_TRUE(IsBlocking(*server));
}

TEST_F(UnixSocketTest, ANonBlockingListenerWithoutAPeerIsUnavailable) {
  Listen();
  ASSERT_EQ(::fcntl(listener_.get(), F_SETFL, O_NONBLOCK), 0);
  EXPECT_EQ(AcceptUnix(listener_.get()).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(UnixSocketTest, ShuttingTheListenerDownEndsTheWaitForAPeer) {
  Listen();
  absl::Status status;
  std::thread accepting([&] { status = AcceptUnix(listener_.get()).status(); });
  ::shutdown(listener_.get(), SHUT_RDWR);
  accepting.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
}

TEST_F(UnixSocketTest, RefusesAPathThatTheAddressCannotHold) {
  const std::string path = "/" + std::string(108, 'x');
  EXPECT_EQ(ConnectUnix(path, 0).status().message(),
            fmt::format("socket path {} is longer than 107 bytes", path));
}

}  // namespace
}  // namespace wintserve
