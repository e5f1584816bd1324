#include "tests/fakes/fake_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <utility>

namespace wintserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

class FakeCacheTest : public testing::Test {
 protected:
  std::unique_ptr<CacheClient> Connect(uint64_t api_epoch = 1) {
    CacheEvents events;
    events.on_opened = [this](absl::StatusOr<OpenedPool> opened) { Set(&opened_, opened); };
    events.on_leased = [this](uint64_t, std::vector<PoolBlock> blocks) { Set(&leased_, blocks); };
    events.on_closed = [this](absl::Status status) { Set(&closed_, status); };
    auto client = cache_.Connector()(api_epoch, std::move(events));
    return client.ok() ? *std::move(client) : nullptr;
  }

  static PoolSpec Spec() {
    PoolSpec spec;
    spec.num_blocks = 4;
    spec.block_bytes_by_rank = {4096};
    spec.block_size_tokens = 2;
    return spec;
  }

  template <typename T>
  void Set(std::optional<T>* slot, T value) {
    MutexLock lock(&mu_);
    *slot = std::move(value);
    changed_.NotifyAll();
  }
  template <typename T>
  std::optional<T> Take(std::optional<T>* slot, int timeout_ms = 10'000) {
    MutexLock lock(&mu_);
    changed_.WaitFor(&mu_, std::chrono::milliseconds(timeout_ms),
                     [&] { return slot->has_value(); });
    return std::exchange(*slot, std::nullopt);
  }

  Mutex mu_;
  CondVar changed_;
  std::optional<absl::StatusOr<OpenedPool>> opened_;
  std::optional<std::vector<PoolBlock>> leased_;
  std::optional<absl::Status> closed_;
  FakeCache cache_;
};

TEST_F(FakeCacheTest, ResumesADroppedSessionAndForgetsADeadPool) {
  auto client = Connect();
  client->OpenPool(Spec());
  const auto first = Take(&opened_);
  ASSERT_TRUE(first.has_value() && first->ok());
  client->LeaseBlocks(1, 3);
  const auto leased = Take(&leased_);
  ASSERT_TRUE(leased.has_value());
  cache_.DropSession();
  EXPECT_EQ(Take(&closed_)->code(), absl::StatusCode::kUnavailable);

  client = Connect();
  client->OpenPool(Spec());
  const auto resumed = Take(&opened_);
  ASSERT_TRUE(resumed.has_value() && resumed->ok());
  EXPECT_TRUE((*resumed)->resumed);
  EXPECT_EQ((*resumed)->pool_epoch, (*first)->pool_epoch);
  client->LeaseBlocks(1, 1);
  EXPECT_THAT(*Take(&leased_), IsEmpty());
  EXPECT_THAT(cache_.refusals(), ElementsAre(HasSubstr("Reconcile comes first")));
  client->Reconcile({}, {leased->at(0)}, 0);
  client->LeaseBlocks(1, 4);
  EXPECT_THAT(*Take(&leased_), SizeIs(3));

  cache_.SetReachable(false);
  cache_.Die();
  EXPECT_TRUE(Take(&closed_).has_value());
  EXPECT_EQ(Connect(), nullptr);
  cache_.SetReachable(true);
  client = Connect();
  client->OpenPool(Spec());
  const auto fresh = Take(&opened_);
  ASSERT_TRUE(fresh.has_value() && fresh->ok());
  EXPECT_FALSE((*fresh)->resumed);
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
  EXPECT_TRUE(cache_.CheckInvariants().ok());
}

TEST_F(FakeCacheTest, HoldsAndDelaysAnswers) {
  auto client = Connect();
  cache_.Hold(true);
  client->OpenPool(Spec());
  EXPECT_FALSE(Take(&opened_, /*timeout_ms=*/50).has_value());
  cache_.Hold(false);
  EXPECT_TRUE(Take(&opened_).has_value());
  cache_.SetDelay(std::chrono::milliseconds(50));
  const auto start = std::chrono::steady_clock::now();
  client->LeaseBlocks(1, 1);
  EXPECT_THAT(*Take(&leased_), SizeIs(1));
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(50));
  cache_.Hold(true);
  client.reset();  // does not wait for ever
}

}  // namespace
}  // namespace wintserve
