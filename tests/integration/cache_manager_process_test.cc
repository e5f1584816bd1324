// The cache manager as a process: start, stop, and what its clients see when it dies or hangs.
#include "tests/integration/cache_manager_process.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <string>

#include "common/exit_code.h"

namespace wintserve {
namespace {

namespace fs = std::filesystem;
using ::testing::EndsWith;
using ::testing::HasSubstr;

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
  // 3 s of silence, looked for every 250 ms; the rest is for a busy machine. gRPC alone would not
  // notice.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
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
