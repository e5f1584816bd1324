#include "engine_worker/runner/block_copier.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace wintserve {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int64_t kBlockBytes = 16;

class NoEvent : public kernels::Event {
 public:
  bool IsDone() override { return true; }
  absl::Status Wait() override { return absl::OkStatus(); }
  int64_t MicrosecondsSince(const kernels::Event&) const override { return 0; }
};

// Writes down what is asked of it, by offsets into the two tiers.
class NotingQueue : public kernels::CopyQueue {
 public:
  NotingQueue(const BlockTiers& tiers, std::vector<std::string>* notes)
      : tiers_(tiers), notes_(notes) {}
  void CopyFromHost(void* device, const void* host, int64_t size_bytes) override {
    Note("in", device, host, size_bytes);
  }
  void CopyToHost(void* host, const void* device, int64_t size_bytes) override {
    Note("out", device, host, size_bytes);
  }
  void WaitForOperators() override { notes_->push_back("wait"); }
  void HoldOperators() override { notes_->push_back("hold"); }
  std::unique_ptr<kernels::Event> Record() override {
    notes_->push_back("record");
    return std::make_unique<NoEvent>();
  }

 private:
  void Note(const char* what, const void* device, const void* host, int64_t size_bytes) {
    EXPECT_EQ(size_bytes, kBlockBytes);
    const auto index = [](const void* at, const void* tier) {
      return (static_cast<const char*>(at) - static_cast<const char*>(tier)) / kBlockBytes;
    };
    notes_->push_back(fmt::format("{} block {} slot {}", what, index(device, tiers_.pool),
                                  index(host, tiers_.host_tier)));
  }

  const BlockTiers tiers_;
  std::vector<std::string>* const notes_;
};

class BlockCopierTest : public testing::Test {
 protected:
  std::vector<std::string> TakeNotes() { return std::exchange(notes_, {}); }
  void WaitForBlocks(std::vector<int32_t> blocks) { copier_.WaitForBlocks(blocks); }

  std::vector<char> pool_ = std::vector<char>(8 * kBlockBytes);
  std::vector<char> host_tier_ = std::vector<char>(4 * kBlockBytes);
  const BlockTiers tiers_ = {.pool = pool_.data(),
                             .num_blocks = 8,
                             .host_tier = host_tier_.data(),
                             .num_host_slots = 4,
                             .block_bytes = kBlockBytes};
  std::vector<std::string> notes_;
  BlockCopier copier_{tiers_, std::make_unique<NotingQueue>(tiers_, &notes_)};
};

BlockCopy In(int block, uint32_t slot) { return {true, BlockId{block}, slot}; }
BlockCopy Out(int block, uint32_t slot) { return {false, BlockId{block}, slot}; }

TEST_F(BlockCopierTest, CopiesComeInTheirOrderBehindTheOperatorsThatFilledTheBlocks) {
  EXPECT_NE(copier_.Begin(std::vector{Out(5, 3), In(2, 3), Out(0, 1)}), nullptr);
  EXPECT_THAT(TakeNotes(), ElementsAre("wait", "out block 5 slot 3", "in block 2 slot 3",
                                       "out block 0 slot 1", "record"));
  EXPECT_EQ(copier_.Begin({}), nullptr);
  EXPECT_THAT(TakeNotes(), IsEmpty());
}

TEST_F(BlockCopierTest, OnlyOperatorsThatUseARestoredBlockWaitAndOnlyOnce) {
  copier_.Begin(std::vector{In(2, 0), In(3, 1)});
  copier_.Begin(std::vector{Out(6, 2)});
  TakeNotes();
  WaitForBlocks({0, 1, 6, 7});  // 6 goes out, which nobody has to wait for
  EXPECT_THAT(TakeNotes(), IsEmpty());
  WaitForBlocks({0, 3, 2});
  EXPECT_THAT(TakeNotes(), ElementsAre("hold"));
  WaitForBlocks({2, 3});
  EXPECT_THAT(TakeNotes(), IsEmpty());
}

TEST_F(BlockCopierTest, ABlockThatIsRestoredAgainIsWaitedForAgain) {
  copier_.Begin(std::vector{In(2, 0)});
  WaitForBlocks({2});
  copier_.Begin(std::vector{In(4, 1)});
  TakeNotes();
  WaitForBlocks({2});  // of which the copy has been waited for
  EXPECT_THAT(TakeNotes(), IsEmpty());
  copier_.Begin(std::vector{In(2, 3)});
  TakeNotes();
  WaitForBlocks({2});
  EXPECT_THAT(TakeNotes(), ElementsAre("hold"));
  WaitForBlocks({4});  // came before
  EXPECT_THAT(TakeNotes(), IsEmpty());
}

TEST(BlockCopier, WithoutAHostTierNothingIsWaitedFor) {
  BlockCopier copier({.num_blocks = 4, .block_bytes = kBlockBytes}, nullptr);
  copier.WaitForBlocks(std::vector<int32_t>{0, 3});
  EXPECT_EQ(copier.Begin({}), nullptr);
}

}  // namespace
}  // namespace wintserve
