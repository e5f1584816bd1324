#include "common/unix_socket.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>
#include <vector>

#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kPatienceMs = 20'000;

class UnixSocketTest : public testing::Test {
 protected:
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

  const TempDir directory_;
  const std::string path_ = (directory_.path() / "socket").string();
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

// Runs in a child process as the user "nobody": whether the listener closes the connection at once.
bool IsClosedToNobody(const std::string& path) {
  constexpr uid_t kNobody = 65534;
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  const pid_t child = ::fork();
  if (child == 0) {  // system calls only: other threads may hold locks
    char byte;
    const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET, 0);
    const bool closed =
        ::setresuid(kNobody, kNobody, kNobody) == 0 &&
        ::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0 &&
        ::recv(fd, &byte, 1, 0) <= 0;
    ::_exit(closed ? 0 : 1);
  }
  int status = -1;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return status == 0;
}

TEST_F(UnixSocketTest, APeerOfAnotherUserIsClosedAndTheWaitGoesOn) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can become another user";
  Listen();
  // Or it could not connect at all.
  ASSERT_EQ(::chmod(directory_.path().c_str(), 0711), 0);
  ASSERT_EQ(::chmod(path_.c_str(), 0666), 0);
  absl::StatusOr<UniqueFd> accepted = absl::UnknownError("nobody came");
  std::thread accepting([&] { accepted = AcceptUnix(listener_.get()); });
  EXPECT_TRUE(IsClosedToNobody(path_));
  const auto ours = ConnectUnix(path_, kPatienceMs);
  accepting.join();
  EXPECT_TRUE(ours.ok()) << ours.status();
  EXPECT_TRUE(accepted.ok()) << accepted.status();
}

TEST_F(UnixSocketTest, TheSocketIsForItsUserAlone) {
  Listen();
  struct stat info = {};
  ASSERT_EQ(::stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
}

TEST(PrivateDirectory, IsOursAloneAndNoLink) {
  const TempDir dir;
  const std::string path = dir.path().string();
  EXPECT_TRUE(CheckPrivateDirectory(path).ok());
  const auto error = [](const std::string& of) {
    const absl::Status status = CheckPrivateDirectory(of);
    EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << of;
    return std::string(status.message());
  };
  const std::string link = path + ".link";
  ASSERT_EQ(::symlink(path.c_str(), link.c_str()), 0);
  EXPECT_EQ(error(link), "runtime directory: " + link + ": is a symbolic link");
  ASSERT_EQ(::unlink(link.c_str()), 0);
  EXPECT_EQ(error(link), "runtime directory: " + link + ": No such file or directory");
  EXPECT_EQ(error("/dev/null"), "runtime directory: /dev/null: is not a directory");
  for (const mode_t mode : {0755, 0770, 0701, 01700}) {
    ASSERT_EQ(::chmod(path.c_str(), mode), 0);
    EXPECT_EQ(error(path),
              fmt::format("runtime directory: {}: has mode {:04o}, must be 0700", path, mode));
  }
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(path.c_str(), 65534, 0), 0);
    EXPECT_EQ(error(path), "runtime directory: " + path + ": belongs to user 65534, not to 0");
  }
}

// Both ends of a connection.
struct Connection {
  Connection() {
    int ends[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    first.Reset(ends[0]);
    second.Reset(ends[1]);
  }
  UniqueFd first;
  UniqueFd second;
};

TEST(UnixSocketFds, ComeInTheirOrderAsManyAsThePacketMayCarry) {
  for (const int count : {0, 1, 2, 3, kMaxPacketFds}) {
    SCOPED_TRACE(count);
    Connection connection;
    // Files of distinct sizes, to know them by.
    std::vector<UniqueFd> sent;
    std::vector<int> numbers;
    for (int i = 0; i < count; ++i) {
      sent.emplace_back(::memfd_create("unix_socket_test", MFD_CLOEXEC));
      ASSERT_EQ(::ftruncate(sent.back().get(), i), 0);
      numbers.push_back(sent.back().get());
    }
    ASSERT_TRUE(SendPacket(connection.first.get(), "text", numbers).ok());
    const auto packet = ReceivePacketWithFds(connection.second.get(), kPatienceMs);
    ASSERT_TRUE(packet.ok()) << packet.status();
    EXPECT_EQ(packet->bytes, "text");
    ASSERT_EQ(std::ssize(packet->fds), count);
    for (int i = 0; i < count; ++i) {
      EXPECT_EQ(::lseek(packet->fds[i].get(), 0, SEEK_END), i);
      EXPECT_NE(::fcntl(packet->fds[i].get(), F_GETFD) & FD_CLOEXEC, 0);
    }
  }
}

TEST(UnixSocketFds, MoreThanAPacketMayCarryAreNotSent) {
  Connection connection;
  const std::vector<int> numbers(kMaxPacketFds + 1, connection.first.get());
  EXPECT_EQ(SendPacket(connection.first.get(), "", numbers).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(UnixSocketFds, SeveralAreRefusedWhereOneIsExpected) {
  Connection connection;
  for (const size_t count : {2, 3, 8}) {
    const std::vector<int> numbers(count, connection.first.get());
    ASSERT_TRUE(SendPacket(connection.first.get(), "text", numbers).ok());
    const auto packet = ReceivePacket(connection.second.get(), kPatienceMs);
    EXPECT_EQ(packet.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(packet.status().message()), HasSubstr("several descriptors"));
  }
}

TEST_F(UnixSocketTest, RefusesAPathThatTheAddressCannotHold) {
  const std::string path = "/" + std::string(108, 'x');
  EXPECT_EQ(ConnectUnix(path, 0).status().message(),
            fmt::format("socket path {} is longer than 107 bytes", path));
}

}  // namespace
}  // namespace wintserve
