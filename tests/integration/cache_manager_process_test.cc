// The cache manager as a process: start, stop, and what its clients see when it dies or hangs.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cache_manager/client/cache_client.h"
#include "cache_manager/client/pool_memory_client.h"
#include "common/config/instance.h"
#include "common/exit_code.h"
#include "common/mapped_memory.h"
#include "common/mutex.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

namespace fs = std::filesystem;
using std::chrono::seconds;
using ::testing::EndsWith;
using ::testing::HasSubstr;

constexpr int64_t kTimeoutMs = 10'000;

// A value that another thread sets.
template <typename T>
class Promise {
 public:
  void Set(T value) {
    MutexLock lock(&mu_);
    value_ = std::move(value);
    changed_.NotifyAll();
  }
  T Wait(T otherwise) {
    MutexLock lock(&mu_);
    changed_.WaitFor(&mu_, seconds(10), [this] { return value_.has_value(); });
    return value_.value_or(std::move(otherwise));
  }

 private:
  Mutex mu_;
  CondVar changed_;
  std::optional<T> value_;
};

// A socket bound to a free port of the loopback, which it holds while it lives.
struct BoundPort {
  UniqueFd socket{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  int port = 0;

  BoundPort() {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof(address);
    auto* const generic = reinterpret_cast<sockaddr*>(&address);
    EXPECT_EQ(::bind(socket.get(), generic, length), 0);
    EXPECT_EQ(::listen(socket.get(), 1), 0);
    EXPECT_EQ(::getsockname(socket.get(), generic, &length), 0);
    port = ntohs(address.sin_port);
  }
};

class CacheManagerProcess : public testing::Test {
 protected:
  void SetUp() override {
    std::string directory = testing::TempDir() + "/cache_manager_XXXXXX";
    ASSERT_NE(::mkdtemp(directory.data()), nullptr);
    instance_.runtime_dir = directory;
    instance_.token = std::string("\0\xff\x80 token of exactly 32 bytes..", 32);
    instance_.options.cache_queue_port = BoundPort().port;  // free again once this line is over
  }

  void TearDown() override {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      WaitForExit();
    }
    fs::remove_all(instance_.runtime_dir);
  }

  // Starts the binary with these arguments, its stderr into a pipe.
  void Spawn(std::string argument) {
    int ends[2];
    ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
    stderr_.Reset(ends[0]);
    const UniqueFd child_stderr(ends[1]);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, child_stderr.get(), STDERR_FILENO);
    std::string binary = CACHE_MANAGER_BINARY;
    char* const argv[] = {binary.data(), argument.data(), nullptr};
    ASSERT_EQ(::posix_spawn(&pid_, binary.c_str(), &actions, nullptr, argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
  }

  void Start() {
    const auto fd = WriteInstance(instance_);
    ASSERT_TRUE(fd.ok()) << fd.status();
    Spawn("--instance-fd=" + std::to_string(fd->get()));
  }

  // The exit code, or minus the signal that ended the process.
  int WaitForExit() {
    int status = 0;
    EXPECT_EQ(::waitpid(pid_, &status, 0), pid_);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

  // REQUIRES: the process has exited.
  std::string ReadStderr() {
    std::string text;
    char buffer[4096];
    ssize_t count;
    while ((count = ::read(stderr_.get(), buffer, sizeof(buffer))) > 0) text.append(buffer, count);
    return text;
  }

  // Connects and opens a pool of 2 blocks.
  void OpenPool() {
    client_.reset();
    opened_ = std::make_unique<Promise<absl::StatusOr<OpenedPool>>>();
    closed_ = std::make_unique<Promise<absl::Status>>();
    CacheEvents events;
    events.on_opened = [this](absl::StatusOr<OpenedPool> opened) { opened_->Set(opened); };
    events.on_closed = [this](absl::Status status) { closed_->Set(status); };
    auto client = ConnectCacheClient("unix:" + instance_.cache_socket(), instance_.token,
                                     /*api_epoch=*/1, std::move(events), kTimeoutMs);
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    PoolSpec spec;
    spec.num_blocks = 2;
    spec.block_bytes_by_rank = {4096};
    spec.host_bytes = 3 * 4096;
    client_->OpenPool(spec);
    pool_ = opened_->Wait(absl::DeadlineExceededError("no on_opened"));
    ASSERT_TRUE(pool_.ok()) << pool_.status();
  }

  absl::StatusOr<MappedMemory> Fetch(PoolTier tier = PoolTier::kDevice) {
    ASSIGN_OR_RETURN(SharedMemory shared, FetchPoolMemory(pool_->memory_socket, instance_.token,
                                                          pool_->pool_epoch, 0, tier, kTimeoutMs));
    return MappedMemory::FromParts(std::move(shared));
  }

  Instance instance_;
  pid_t pid_ = -1;
  UniqueFd stderr_;
  std::unique_ptr<Promise<absl::StatusOr<OpenedPool>>> opened_;
  std::unique_ptr<Promise<absl::Status>> closed_;
  absl::StatusOr<OpenedPool> pool_ = absl::UnavailableError("not opened yet");
  std::unique_ptr<CacheClient> client_;
};

TEST_F(CacheManagerProcess, ServesUntilSigtermThenExitsZeroAndUnlinksItsSockets) {
  Start();
  OpenPool();
  EXPECT_TRUE(Fetch().ok());
  const auto host = Fetch(PoolTier::kHost);
  ASSERT_TRUE(host.ok()) << host.status();
  EXPECT_EQ(host->size_bytes(), 3 * 4096);
  ASSERT_EQ(::kill(pid_, SIGTERM), 0);
  EXPECT_EQ(WaitForExit(), kExitOk);
  EXPECT_TRUE(fs::is_empty(instance_.runtime_dir));
  EXPECT_EQ(closed_->Wait(absl::OkStatus()).code(), absl::StatusCode::kUnavailable);
  const std::string log = ReadStderr();
  EXPECT_THAT(log, HasSubstr("created, 2 blocks and 3 host slots, bytes of a block by rank: 4096"));
  EXPECT_THAT(log, HasSubstr("stopping on SIGTERM"));
}

TEST_F(CacheManagerProcess, ExitsZeroOnSigintToo) {
  Start();
  OpenPool();
  ASSERT_EQ(::kill(pid_, SIGINT), 0);
  EXPECT_EQ(WaitForExit(), kExitOk);
}

TEST_F(CacheManagerProcess, KilledTellsTheClientAndLeavesTheWorkersMappingValid) {
  Start();
  OpenPool();
  const auto memory = Fetch();
  ASSERT_TRUE(memory.ok()) << memory.status();
  static_cast<char*>(memory->data())[5000] = 42;
  ASSERT_EQ(::kill(pid_, SIGKILL), 0);
  EXPECT_EQ(WaitForExit(), -SIGKILL);
  EXPECT_EQ(closed_->Wait(absl::OkStatus()).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(static_cast<char*>(memory->data())[5000], 42);

  // A new one takes the place of the sockets that the dead one has left.
  ASSERT_TRUE(fs::exists(instance_.cache_socket()));
  const uint64_t old_epoch = pool_->pool_epoch;
  Start();
  OpenPool();
  EXPECT_FALSE(pool_->resumed);
  EXPECT_NE(pool_->pool_epoch, old_epoch);
  EXPECT_TRUE(Fetch().ok());
  EXPECT_EQ(FetchPoolMemory(pool_->memory_socket, instance_.token, old_epoch, 0, PoolTier::kDevice,
                            kTimeoutMs)
                .status()
                .code(),
            absl::StatusCode::kNotFound);
}

TEST_F(CacheManagerProcess, StoppedInItsTracksIsToldToTheClient) {
  Start();
  OpenPool();
  ASSERT_EQ(::kill(pid_, SIGSTOP), 0);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(closed_->Wait(absl::OkStatus()).code(), absl::StatusCode::kDeadlineExceeded);
  // 3 s of silence, looked for every 250 ms; the rest is for a busy machine.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(4000));
}

TEST_F(CacheManagerProcess, ExitsUnavailableWithOneLineWhenItsPortIsTaken) {
  const BoundPort taken;
  instance_.options.cache_queue_port = taken.port;
  Start();
  EXPECT_EQ(WaitForExit(), kExitUnavailable);
  const std::string log = ReadStderr();
  EXPECT_EQ(std::count(log.begin(), log.end(), '\n'), 1) << log;
  EXPECT_THAT(log, EndsWith("cannot listen on 127.0.0.1:" + std::to_string(taken.port) +
                            ", is the port taken? Choose another with --cache-queue-port\n"));
}

TEST_F(CacheManagerProcess, ExitsUsageWhenStartedByHand) {
  Spawn("--help");
  EXPECT_EQ(WaitForExit(), kExitUsage);
  EXPECT_THAT(ReadStderr(), HasSubstr("is started by `wintserve serve`"));
}

}  // namespace
}  // namespace wintserve
