// A cache manager's server and clients of it, for the tests of both ends of the wire.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "cache_manager/client/cache_client.h"
#include "cache_manager/memory/memory_server.h"
#include "cache_manager/service/cache_server.h"
#include "cache_manager/service/pool_owner.h"
#include "common/mutex.h"

namespace wintserve {

inline constexpr int64_t kTimeoutMs = 10'000;
inline constexpr uint64_t kApiEpoch = 0xabc;
inline const std::string kToken = std::string("\0\xff\x80 token of exactly 32 bytes..", 32);

// Records a client's events; waits for them.
class Recorder {
 public:
  CacheEvents Events() {
    CacheEvents events;
    events.on_opened = [this](absl::StatusOr<OpenedPool> opened) { Set(&opened_, opened); };
    events.on_closed = [this](absl::Status status) { Set(&closed_, status); };
    events.on_peeked = [this](uint64_t tag, PeekResult peeked) { Put(&peeked_, tag, peeked); };
    events.on_matched = [this](uint64_t tag, MatchResult matched) { Put(&matched_, tag, matched); };
    events.on_leased = [this](uint64_t tag, std::vector<PoolBlock> blocks) {
      Put(&leased_, tag, std::move(blocks));
    };
    events.on_committed = [this](uint64_t tag, std::vector<CommittedBlock> committed) {
      Put(&committed_, tag, std::move(committed));
    };
    events.on_copy_out = [this](std::vector<CopyOrder> copies) { Set(&copy_out_, copies); };
    events.on_available = [this](uint32_t available) {
      MutexLock lock(&mu_);
      available_ = available;
    };
    return events;
  }

  absl::StatusOr<OpenedPool> Opened() {
    return Take(&opened_).value_or(absl::DeadlineExceededError("no on_opened"));
  }
  absl::Status Closed() {
    return Take(&closed_).value_or(absl::DeadlineExceededError("no on_closed"));
  }
  std::vector<CopyOrder> CopyOut() { return Take(&copy_out_).value_or(std::vector<CopyOrder>()); }
  std::vector<PoolBlock> Leased(uint64_t tag) { return Get(&leased_, tag); }
  std::vector<CommittedBlock> Committed(uint64_t tag) { return Get(&committed_, tag); }
  MatchResult Matched(uint64_t tag) { return Get(&matched_, tag); }
  PeekResult Peeked(uint64_t tag) { return Get(&peeked_, tag); }
  // With the last reply.
  uint32_t available() {
    MutexLock lock(&mu_);
    return available_;
  }
  bool has_closed() {
    MutexLock lock(&mu_);
    return closed_.has_value();
  }

 private:
  template <typename T>
  void Set(std::optional<T>* slot, T value) {
    MutexLock lock(&mu_);
    *slot = std::move(value);
    changed_.NotifyAll();
  }
  template <typename T>
  void Put(std::map<uint64_t, T>* results, uint64_t tag, T result) {
    MutexLock lock(&mu_);
    (*results)[tag] = std::move(result);
    changed_.NotifyAll();
  }
  template <typename T>
  T Get(std::map<uint64_t, T>* results, uint64_t tag) {
    MutexLock lock(&mu_);
    EXPECT_TRUE(
        changed_.WaitFor(&mu_, std::chrono::seconds(10), [&] { return results->contains(tag); }));
    return (*results)[tag];
  }
  template <typename T>
  std::optional<T> Take(std::optional<T>* slot) {
    MutexLock lock(&mu_);
    changed_.WaitFor(&mu_, std::chrono::seconds(10), [&] { return slot->has_value(); });
    return std::exchange(*slot, std::nullopt);
  }

  Mutex mu_;
  CondVar changed_;
  std::optional<absl::StatusOr<OpenedPool>> opened_;
  std::optional<absl::Status> closed_;
  std::optional<std::vector<CopyOrder>> copy_out_;
  std::map<uint64_t, PeekResult> peeked_;
  std::map<uint64_t, MatchResult> matched_;
  std::map<uint64_t, std::vector<PoolBlock>> leased_;
  std::map<uint64_t, std::vector<CommittedBlock>> committed_;
  uint32_t available_ = 0;
};

class SessionTest : public testing::Test {
 protected:
  void SetUp() override {
    const std::string prefix = testing::TempDir() + "/session_" + std::to_string(::getpid());
    unix_path_ = prefix + "_cache.sock";
    auto memory_server = MemoryServer::Start(prefix + "_memory.sock", kToken);
    ASSERT_TRUE(memory_server.ok()) << memory_server.status();
    memory_server_ = *std::move(memory_server);
    owner_ = std::make_unique<PoolOwner>(memory_server_.get());
    StartServer();
  }

  void StartServer() {
    auto server = CacheServer::Start(Options(), owner_.get());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  static void Authorize(grpc::ClientContext* context) {
    context->AddMetadata("wintserve-token", absl::BytesToHexString(kToken));
  }

  CacheServerOptions Options() const {
    return {.host = "127.0.0.1", .port = 0, .unix_path = unix_path_, .token = kToken};
  }
  std::string target() const { return "unix:" + unix_path_; }

  std::unique_ptr<CacheClient> Connect(Recorder* recorder, uint64_t api_epoch = kApiEpoch) {
    auto client = ConnectCacheClient(target(), kToken, api_epoch, recorder->Events(), kTimeoutMs);
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }

  // The server learns of a client's end a moment after the client.
  void WaitUntilNothingIsLeased() {
    for (int i = 0; i < 500 && owner_->Stats().num_leased() != 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_EQ(owner_->Stats().num_leased(), 0u);
  }

  std::string unix_path_;
  std::unique_ptr<MemoryServer> memory_server_;
  std::unique_ptr<PoolOwner> owner_;
  std::unique_ptr<CacheServer> server_;
};

inline PoolSpec Pool(uint32_t num_blocks, std::vector<uint64_t> block_bytes_by_rank) {
  PoolSpec spec;
  spec.num_blocks = num_blocks;
  spec.block_bytes_by_rank = std::move(block_bytes_by_rank);
  spec.root_seed = "seed";
  spec.block_size_tokens = 2;
  return spec;
}

inline PoolSpec SmallPool() { return Pool(4, {4096, 4096}); }

inline PoolSpec TieredPool() {
  PoolSpec spec = SmallPool();
  spec.host_bytes = 4 * 8192;
  return spec;
}

// Commits `blocks` as the tokens 0, 1, 2, ….
inline CommitRequest CommitOf(const std::vector<PoolBlock>& blocks) {
  CommitRequest request;
  for (const PoolBlock& block : blocks) {
    const auto next = static_cast<int32_t>(2 * request.blocks.size());
    request.blocks.push_back({block, {next, next + 1}});
  }
  return request;
}

inline std::vector<uint64_t> EntriesOf(const std::vector<CommittedBlock>& committed) {
  std::vector<uint64_t> entries;
  for (const CommittedBlock& block : committed) entries.push_back(block.entry);
  return entries;
}

inline const std::vector<int32_t> kPrompt = {0, 1, 2, 3, 4, 5, 6, 7, 8};

}  // namespace wintserve
