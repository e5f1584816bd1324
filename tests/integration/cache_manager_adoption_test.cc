// An API server dies, the cache manager's process lives on, and another API server adopts the pool.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <thread>

#include "tests/integration/cache_manager_process.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr int kBlockSizeTokens = 4;
constexpr size_t kBlockBytes = 4096;
const std::vector<int32_t> kPrompt = {1, 2, 3, 4, 5, 6, 7, 8, 9};
// Where the process that is killed finds the cache manager's runtime directory and its token.
constexpr char kDirectoryVariable[] = "CACHE_MANAGER_TEST_DIRECTORY";

class CacheManagerAdoption : public CacheManagerProcess {
 protected:
  static PoolSpec Spec(uint32_t num_blocks) {
    PoolSpec spec;
    spec.num_blocks = num_blocks;
    spec.block_bytes_by_rank = {kBlockBytes};
    spec.root_seed = "model";
    spec.block_size_tokens = kBlockSizeTokens;
    return spec;
  }

  // What an API server does that is about to die: two blocks written and committed, two leased.
  void HoldBlocks() {
    AskForPool(Spec(6), /*api_epoch=*/1);
    ASSERT_TRUE(pool_.ok()) << pool_.status();
    const auto memory = Fetch();
    ASSERT_TRUE(memory.ok()) << memory.status();
    const auto leased = Lease(4);
    ASSERT_THAT(leased, SizeIs(4));
    CommitRequest commit;
    commit.step = 7;
    for (int i = 0; i < 2; ++i) {
      std::memset(BytesOf(*memory, leased[i]), 'a' + i, kBlockBytes);
      const auto first = kPrompt.begin() + i * kBlockSizeTokens;
      commit.blocks.push_back({leased[i], {first, first + kBlockSizeTokens}});
    }
    ASSERT_THAT(Commit(commit), SizeIs(2));
  }

  // Asks until the cache manager knows that the session before is gone, which takes no longer than
  // it takes to notice that a socket was closed.
  void Adopt(uint64_t pool_epoch, uint64_t api_epoch) {
    PoolSpec spec = Spec(/*num_blocks=*/0);
    spec.resume_only = true;
    spec.adopt_pool_epoch = pool_epoch;
    const auto deadline = steady_clock::now() + milliseconds(3000);
    do {
      AskForPool(spec, api_epoch);
    } while (absl::IsFailedPrecondition(pool_.status()) && steady_clock::now() < deadline);
    ASSERT_TRUE(pool_.ok()) << pool_.status();
    EXPECT_EQ(pool_->pool_epoch, pool_epoch);
    EXPECT_FALSE(pool_->resumed);
  }

  static char* BytesOf(const MappedMemory& memory, const PoolBlock& block) {
    return static_cast<char*>(memory.data()) + static_cast<size_t>(block.id) * kBlockBytes;
  }

  // The prefix of the one that is gone, its bytes, and what it had leased once that is fenced.
  void ExpectWhatWasLeft() {
    EXPECT_EQ(pool_->num_blocks, 6u);
    const auto memory = Fetch();  // as a worker that was started anew
    ASSERT_TRUE(memory.ok()) << memory.status();
    const MatchResult match = Match(kPrompt);
    ASSERT_THAT(match.device, SizeIs(2));
    for (int i = 0; i < 2; ++i) {
      const char* const bytes = BytesOf(*memory, match.device[i].block);
      EXPECT_EQ(std::count(bytes, bytes + kBlockBytes, 'a' + i), int64_t{kBlockBytes});
    }
    EXPECT_THAT(Lease(6), SizeIs(2)) << "two are matched, two may still be written to";
    client_->Fence();
    EXPECT_THAT(Lease(6), SizeIs(2));
    EXPECT_THAT(Lease(6), IsEmpty());
  }

  // This test binary as another process, which holds blocks until it is killed.
  pid_t SpawnHolder(UniqueFd* output) {
    int ends[2];
    EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
    output->Reset(ends[0]);
    const UniqueFd child_output(ends[1]);
    std::ofstream(instance_.runtime_dir + "/token") << instance_.token;
    ::setenv(kDirectoryVariable, instance_.runtime_dir.c_str(), 1);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, child_output.get(), STDOUT_FILENO);
    std::string self = "/proc/self/exe";
    std::string filter = "--gtest_filter=*DISABLED_HoldsBlocksUntilItIsKilled";
    std::string also = "--gtest_also_run_disabled_tests";
    char* const argv[] = {self.data(), filter.data(), also.data(), nullptr};
    pid_t pid = -1;
    EXPECT_EQ(::posix_spawn(&pid, self.c_str(), &actions, nullptr, argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    ::unsetenv(kDirectoryVariable);
    return pid;
  }

  int NumOpenFds() const {
    const std::filesystem::directory_iterator fds("/proc/" + std::to_string(pid_) + "/fd");
    return static_cast<int>(std::distance(begin(fds), end(fds)));
  }
  int NumMappings() const {
    std::ifstream maps("/proc/" + std::to_string(pid_) + "/maps");
    return static_cast<int>(
        std::count(std::istreambuf_iterator<char>(maps), std::istreambuf_iterator<char>(), '\n'));
  }
  int64_t ResidentBytes() const {
    std::ifstream statm("/proc/" + std::to_string(pid_) + "/statm");
    int64_t total = 0;
    int64_t resident = 0;
    statm >> total >> resident;
    return resident * ::sysconf(_SC_PAGESIZE);
  }
};

// Not a test: the process that SpawnHolder starts.
TEST_F(CacheManagerAdoption, DISABLED_HoldsBlocksUntilItIsKilled) {
  const char* const directory = ::getenv(kDirectoryVariable);
  ASSERT_NE(directory, nullptr) << "it is started by a test";
  const std::string own = std::exchange(instance_.runtime_dir, directory);
  std::filesystem::remove_all(own);
  std::ifstream token(instance_.runtime_dir + "/token");
  instance_.token.assign(std::istreambuf_iterator<char>(token), {});
  HoldBlocks();
  ASSERT_FALSE(HasFatalFailure());
  std::cout << "holding " << pool_->pool_epoch << std::endl;
  while (true) ::pause();
}

TEST_F(CacheManagerAdoption, AfterASessionThatClosed) {
  Start();
  HoldBlocks();
  ASSERT_FALSE(HasFatalFailure());
  const uint64_t pool_epoch = pool_->pool_epoch;
  client_.reset();
  Adopt(pool_epoch, /*api_epoch=*/2);
  ASSERT_FALSE(HasFatalFailure());
  ExpectWhatWasLeft();
}

TEST_F(CacheManagerAdoption, AfterAClientThatWasKilled) {
  Start();
  UniqueFd output;
  const pid_t holder = SpawnHolder(&output);
  ASSERT_GT(holder, 0);
  std::string said;
  char buffer[4096];
  while (said.find("holding ") == std::string::npos || said.back() != '\n') {
    const ssize_t count = ::read(output.get(), buffer, sizeof(buffer));
    ASSERT_GT(count, 0) << said;
    said.append(buffer, static_cast<size_t>(count));
  }
  const uint64_t pool_epoch = std::stoull(said.substr(said.find("holding ") + 8));

  PoolSpec spec = Spec(/*num_blocks=*/0);
  spec.resume_only = true;
  spec.adopt_pool_epoch = pool_epoch;
  AskForPool(spec, /*api_epoch=*/2);
  EXPECT_EQ(pool_.status().code(), absl::StatusCode::kFailedPrecondition) << "it is alive";
  spec.adopt_pool_epoch = pool_epoch + 1;
  AskForPool(spec, /*api_epoch=*/2);
  EXPECT_EQ(pool_.status().code(), absl::StatusCode::kNotFound);

  ASSERT_EQ(::kill(holder, SIGKILL), 0);
  int status = 0;
  ASSERT_EQ(::waitpid(holder, &status, 0), holder);
  Adopt(pool_epoch, /*api_epoch=*/2);
  ASSERT_FALSE(HasFatalFailure());
  ExpectWhatWasLeft();
}

// The states and the index of 16,384 blocks take 300 KiB at least, and the pool a descriptor and a
// mapping: a hundred of them would show.
TEST_F(CacheManagerAdoption, AHundredLeaveNothingBehind) {
  constexpr uint32_t kNumBlocks = 16'384;
  Start();
  AskForPool(Spec(kNumBlocks), /*api_epoch=*/1);
  ASSERT_TRUE(pool_.ok()) << pool_.status();
  const uint64_t pool_epoch = pool_->pool_epoch;
  const auto adopt = [&](uint64_t api_epoch) {
    client_.reset();
    Adopt(pool_epoch, api_epoch);
    ASSERT_FALSE(HasFatalFailure());
    client_->Fence();
    EXPECT_THAT(Lease(kNumBlocks), SizeIs(kNumBlocks)) << "the one before had all of them";
  };
  for (uint64_t i = 0; i < 20; ++i) adopt(100 + i);
  const auto settled = [](const auto& measure, int64_t expected) {
    int64_t measured = measure();
    // gRPC closes a channel's connection a moment after the channel.
    for (int i = 0; i < 300 && measured > expected; ++i) {
      std::this_thread::sleep_for(milliseconds(10));
      measured = measure();
    }
    return measured;
  };
  const int fds = NumOpenFds();
  const int mappings = NumMappings();
  const int64_t resident = ResidentBytes();
  for (uint64_t i = 0; i < 100; ++i) adopt(1000 + i);
  EXPECT_LE(settled([this] { return NumOpenFds(); }, fds), fds);
  EXPECT_LE(settled([this] { return NumMappings(); }, mappings + 10), mappings + 10)
      << "the heap's may come and go";
  EXPECT_LE(settled([this] { return ResidentBytes(); }, resident + (8 << 20)),
            resident + (8 << 20));
}

}  // namespace
}  // namespace wintserve
