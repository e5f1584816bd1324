// The cache manager's binary as a process of its own, and a session with it.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cache_manager/client/cache_client.h"
#include "cache_manager/client/pool_memory_client.h"
#include "common/config/instance.h"
#include "common/mapped_memory.h"
#include "common/mutex.h"
#include "common/status_macros.h"
#include "common/temp_dir_test_util.h"

namespace wintserve {

inline constexpr int64_t kTimeoutMs = 10'000;

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
    changed_.WaitFor(&mu_, std::chrono::seconds(10), [this] { return value_.has_value(); });
    return value_.value_or(std::move(otherwise));
  }
  // What comes next is another value.
  T Take() {
    MutexLock lock(&mu_);
    EXPECT_TRUE(
        changed_.WaitFor(&mu_, std::chrono::seconds(10), [this] { return value_.has_value(); }));
    return std::exchange(value_, std::nullopt).value_or(T());
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
    instance_.runtime_dir = directory_.path().string();
    instance_.token = std::string("\0\xff\x80 token of exactly 32 bytes..", 32);
    instance_.options.cache_queue_port = BoundPort().port;  // free again once this line is over
  }

  void TearDown() override {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      WaitForExit();
    }
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

  static PoolSpec SmallPool() {
    PoolSpec spec;
    spec.num_blocks = 2;
    spec.block_bytes_by_rank = {4096};
    spec.host_bytes = 3 * 4096;
    return spec;
  }

  // Connects and asks for a pool; pool_ is the answer.
  void AskForPool(const PoolSpec& spec, uint64_t api_epoch) {
    client_.reset();
    opened_ = std::make_unique<Promise<absl::StatusOr<OpenedPool>>>();
    closed_ = std::make_unique<Promise<absl::Status>>();
    leased_ = std::make_unique<Promise<std::vector<PoolBlock>>>();
    committed_ = std::make_unique<Promise<std::vector<CommittedBlock>>>();
    matched_ = std::make_unique<Promise<MatchResult>>();
    CacheEvents events;
    events.on_opened = [this](absl::StatusOr<OpenedPool> opened) { opened_->Set(opened); };
    events.on_closed = [this](absl::Status status) { closed_->Set(status); };
    events.on_leased = [this](uint64_t, std::vector<PoolBlock> blocks) { leased_->Set(blocks); };
    events.on_committed = [this](uint64_t, std::vector<CommittedBlock> blocks) {
      committed_->Set(blocks);
    };
    events.on_matched = [this](uint64_t, MatchResult result) { matched_->Set(result); };
    auto client = ConnectCacheClient("unix:" + instance_.cache_socket(), instance_.token, api_epoch,
                                     std::move(events), kTimeoutMs);
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    client_->OpenPool(spec);
    pool_ = opened_->Wait(absl::DeadlineExceededError("no on_opened"));
  }

  // Connects and opens a pool of 2 blocks.
  void OpenPool() {
    AskForPool(SmallPool(), /*api_epoch=*/1);
    ASSERT_TRUE(pool_.ok()) << pool_.status();
  }

  // Of the session that AskForPool has begun. One call of each awaits its answer at a time.
  std::vector<PoolBlock> Lease(uint32_t count) {
    client_->LeaseBlocks(/*tag=*/1, count);
    return leased_->Take();
  }
  std::vector<CommittedBlock> Commit(CommitRequest request) {
    client_->Commit(/*tag=*/1, std::move(request));
    return committed_->Take();
  }
  MatchResult Match(const std::vector<int32_t>& tokens) {
    client_->Match(/*tag=*/1, /*salt=*/"", tokens, /*allow_restore=*/true);
    return matched_->Take();
  }

  absl::StatusOr<MappedMemory> Fetch(PoolTier tier = PoolTier::kDevice) {
    ASSIGN_OR_RETURN(SharedMemory shared, FetchPoolMemory(pool_->memory_socket, instance_.token,
                                                          pool_->pool_epoch, 0, tier, kTimeoutMs));
    return MappedMemory::FromParts(std::move(shared));
  }

  const TempDir directory_;
  Instance instance_;
  pid_t pid_ = -1;
  UniqueFd stderr_;
  std::unique_ptr<Promise<absl::StatusOr<OpenedPool>>> opened_;
  std::unique_ptr<Promise<absl::Status>> closed_;
  std::unique_ptr<Promise<std::vector<PoolBlock>>> leased_;
  std::unique_ptr<Promise<std::vector<CommittedBlock>>> committed_;
  std::unique_ptr<Promise<MatchResult>> matched_;
  absl::StatusOr<OpenedPool> pool_ = absl::UnavailableError("not opened yet");
  std::unique_ptr<CacheClient> client_;
};

}  // namespace wintserve
