#include "common/transport/queue_listener.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "common/temp_dir_test_util.h"
#include "common/transport/queue_transport.h"
#include "common/transport/raw_call_test_util.h"
#include "common/unique_fd.h"
#include "common/unix_socket.h"

namespace wintserve {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kMaxConnections = 3;

// A server without methods behind a listener of each kind: UNAUTHENTICATED says that a call got
// there.
class QueueListenerTest : public testing::Test {
 protected:
  ~QueueListenerTest() override { Stop(); }

  void Start() {
    auto tcp = QueueListener::Tcp("127.0.0.1:0", kMaxConnections);
    ASSERT_TRUE(tcp.ok()) << tcp.status();
    tcp_ = *std::move(tcp);
    auto unix_socket = QueueListener::Unix(path(), kMaxConnections);
    ASSERT_TRUE(unix_socket.ok()) << unix_socket.status();
    unix_ = *std::move(unix_socket);
    grpc::ServerBuilder builder;
    LimitStrangers(&builder);
    builder.RegisterCallbackGenericService(&methods_);
    tcp_->AddTo(&builder);
    unix_->AddTo(&builder);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    tcp_->Start();
    unix_->Start();
  }
  void Stop() {
    tcp_.reset();
    unix_.reset();
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
  }

  std::string path() const { return (directory_.path() / "q.sock").string(); }
  std::string target() const { return fmt::format("127.0.0.1:{}", tcp_->port()); }

  UniqueFd Connect() const {
    UniqueFd fd(::socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(tcp_->port()));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    return fd;
  }
  static grpc::StatusCode CodeOf(const std::string& target, int deadline_s = 20) {
    return Call(target, {.method = "/a.B/C", .deadline = std::chrono::seconds(deadline_s)})
        .status.error_code();
  }

  const TempDir directory_;
  UnknownMethods methods_{"token"};
  std::unique_ptr<QueueListener> tcp_;
  std::unique_ptr<QueueListener> unix_;
  std::unique_ptr<grpc::Server> server_;
};

TEST_F(QueueListenerTest, CallsGetThroughBothSockets) {
  Start();
  for (int i = 0; i < 2 * kMaxConnections; ++i) {  // each on a connection of its own
    EXPECT_EQ(CodeOf(target()), grpc::StatusCode::UNAUTHENTICATED);
    EXPECT_EQ(CodeOf("unix:" + path()), grpc::StatusCode::UNAUTHENTICATED);
  }
}

TEST_F(QueueListenerTest, BeyondTheLimitPeersWaitUntilSomebodyLeaves) {
  Start();
  std::vector<UniqueFd> silent;
  for (int i = 0; i < kMaxConnections; ++i) silent.push_back(Connect());
  // Those that say nothing are dropped after 5 s at the earliest, and the kernel's queue is in
  // order.
  EXPECT_NE(CodeOf(target(), /*deadline_s=*/1), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(CodeOf("unix:" + path()), grpc::StatusCode::UNAUTHENTICATED);
  silent.clear();
  EXPECT_EQ(CodeOf(target()), grpc::StatusCode::UNAUTHENTICATED);
}

TEST_F(QueueListenerTest, TheSocketIsForItsUserAloneAndGoesWithTheListener) {
  const mode_t before = ::umask(0);
  Start();
  ::umask(before);
  struct stat info = {};
  ASSERT_EQ(::stat(path().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
  Stop();
  EXPECT_FALSE(std::filesystem::exists(path()));
}

TEST_F(QueueListenerTest, TakesThePlaceOfADeadSocketAndOfNothingElse) {
  ASSERT_TRUE(ListenUnix(path(), SOCK_STREAM).ok());  // closed at once, but the path stays
  ASSERT_TRUE(std::filesystem::exists(path()));
  Start();
  EXPECT_EQ(CodeOf("unix:" + path()), grpc::StatusCode::UNAUTHENTICATED);
  Stop();
  std::ofstream(path()) << "somebody's file";
  const auto refused = QueueListener::Unix(path(), kMaxConnections);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr(path()));
  EXPECT_TRUE(std::filesystem::exists(path()));
}

TEST_F(QueueListenerTest, AnAddressThatCannotBeListenedOnIsNamed) {
  const UniqueFd other(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  ASSERT_EQ(::bind(other.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(::listen(other.get(), 1), 0);
  ASSERT_EQ(::getsockname(other.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
  const std::string taken = fmt::format("127.0.0.1:{}", ntohs(address.sin_port));
  EXPECT_EQ(
      QueueListener::Tcp(taken, kMaxConnections).status(),
      absl::UnavailableError(fmt::format("cannot listen on {}: Address already in use", taken)));
  for (const char* bad : {"", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000",
                          "host.example:1", "127.0.0.1:1 "}) {
    EXPECT_EQ(QueueListener::Tcp(bad, kMaxConnections).status(),
              absl::UnavailableError(
                  fmt::format("cannot listen on {}: must be an IPv4 address and a port", bad)));
  }
}

}  // namespace
}  // namespace wintserve
