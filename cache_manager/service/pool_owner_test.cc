#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>

#include "cache_manager/service/pool_owner_test_util.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// What a maker of pools is asked for, and what becomes of what it makes.
class CountedMemory final : public PoolMemory {
 public:
  explicit CountedMemory(int* num_alive) : num_alive_(num_alive) { ++*num_alive_; }
  ~CountedMemory() override { --*num_alive_; }
  int num_ranks() const override { return 1; }
  TierMemory device_tier(int /*rank*/) const override { return {}; }
  bool has_host_tier() const override { return false; }
  TierMemory host_tier(int /*rank*/) const override { return {}; }

 private:
  int* const num_alive_;
};

TEST_F(PoolOwnerTest, MemoryIsMadeToTheSizeOfThePoolAndGoesWithIt) {
  std::vector<PoolSize> asked;
  int num_alive = 0;
  make_memory_ = [&](const PoolSize& size, int64_t) -> absl::StatusOr<std::unique_ptr<PoolMemory>> {
    asked.push_back(size);
    EXPECT_EQ(num_alive, 0) << "the memory of the pool before is wanted for this one";
    return std::make_unique<CountedMemory>(&num_alive);
  };
  StartOwner();
  Open(kMe, "block_bytes_by_rank: 8192 host_bytes: 40000");
  ASSERT_EQ(asked.size(), 1u);
  EXPECT_EQ(asked[0].num_blocks, 4u);
  EXPECT_THAT(asked[0].block_bytes_by_rank, testing::ElementsAre(4096, 8192));
  EXPECT_EQ(asked[0].num_host_slots, 3u);
  EXPECT_EQ(num_alive, 1);
  owner_->EndSession(kMe);
  EXPECT_EQ(num_alive, 1) << "it waits for whoever adopts the pool";
  Open(kLater);
  EXPECT_EQ(asked.size(), 2u);
  EXPECT_EQ(num_alive, 1);
  owner_->EndSession(kLater);
  owner_.reset();
  memory_server_.reset();
  EXPECT_EQ(num_alive, 0);
}

TEST_F(PoolOwnerTest, WhatTheMakerOfMemorySaysIsTheRefusal) {
  make_memory_ = [](const PoolSize&, int64_t) -> absl::StatusOr<std::unique_ptr<PoolMemory>> {
    return absl::ResourceExhaustedError("GPU 0 is full");
  };
  StartOwner();
  const proto::CacheReply reply = Handle(kMe, std::string(kOpen) + "}");
  EXPECT_EQ(reply.refusal().text(), "GPU 0 is full");
  EXPECT_EQ(reply.refusal().status_code(),
            static_cast<uint32_t>(absl::StatusCode::kResourceExhausted));
  make_memory_ = &HostPoolMemory::Create;
  StartOwner();
  Open();
}

TEST_F(PoolOwnerTest, RefusesRequestsOfAbsurdLength) {
  constexpr int kAbsurd = 10'000'000;
  Open();
  proto::CacheRequest match;
  match.mutable_match()->mutable_tokens()->Resize(kAbsurd, 1);
  EXPECT_EQ(owner_->Handle(kMe, match)[0].refusal().text(),
            "Match: the number of tokens is 10000000; allowed: 1 to 1048576");
  proto::CacheRequest done;
  done.mutable_copy_done()->mutable_copy_ids()->Resize(kAbsurd, 1);
  EXPECT_EQ(owner_->Handle(kMe, done)[0].refusal().text(),
            "CopyDone: the number of copy_ids is 10000000; allowed: 0 to 1048576");
  proto::CacheRequest release;
  for (uint64_t entry = 1; entry <= kAbsurd; ++entry) release.mutable_release()->add_entries(entry);
  EXPECT_EQ(owner_->Handle(kMe, release)[0].refusal().text(), "no entry 1 to release");
  owner_->SuspendSession(kMe);
  ASSERT_TRUE(Handle(kLater, std::string(kOpen) + "}").opened().resumed());
  EXPECT_EQ(Refusal(kLater, "reconcile { pinned_entry: [1,2,3,4,5] pin_count: [1,1,1,1,1] }"),
            "Reconcile: the number of pinned_entry is 5; allowed: 0 to 4");
}

TEST_F(PoolOwnerTest, EveryReplySaysHowManyBlocksALeaseCouldGet) {
  EXPECT_EQ(Handle(kMe, "ping {}").num_available(), 0u);
  Open();
  EXPECT_EQ(Handle(kMe, "ping {}").num_available(), 4u);
  EXPECT_EQ(Handle(kMe, "lease { count: 3 }").num_available(), 1u);
  EXPECT_EQ(Handle(kMe, "seq: 9 lease { count: 5 }").num_available(), 1u);
  EXPECT_EQ(Handle(kMe, "seq: 9 lease { count: 5 }").seq(), 9u);
  EXPECT_EQ(Handle(kLater, "ping {}").num_available(), 0u) << "not this session's pool";
}

TEST_F(PoolOwnerTest, MatchesWhatWasCommittedUnderTheSameSaltOnly) {
  Open();
  Store(kMe, 2);
  EXPECT_EQ(Handle(kMe, "match { tokens: [0,1,2,3,4] }").matched().device_size(), 2);
  EXPECT_EQ(Handle(kMe, "match { tokens: [0,1,2,3] }").matched().device_size(), 1);
  EXPECT_EQ(Handle(kMe, "match { salt: 'x' tokens: [0,1,2,3,4] }").matched().device_size(), 0);
  EXPECT_EQ(Handle(kMe, "peek { tokens: [0,1,2,3,4] }").peeked().device_blocks(), 2u);
  EXPECT_EQ(owner_->Stats().matches(), 3u);
}

TEST_F(PoolOwnerTest, RefusesHostileRequestsInOneClearLineAndNothingChanges) {
  Open();
  Store(kMe, 1);
  ASSERT_EQ(Handle(kMe, "lease { count: 1 }").leased().blocks_size(), 1);  // block 1
  const std::string long_salt(129, 's');
  struct Case {
    std::string request;
    std::string text;
  };
  const Case cases[] = {
      {"", "a request of an unknown kind"},
      {"peek {}", "Peek: the number of tokens is 0; allowed: 1 to 1048576"},
      {"peek { tokens: 1 salt: '" + long_salt + "' }",
       "Peek: the length of salt is 129; allowed: 0 to 128"},
      {"match {}", "Match: the number of tokens is 0; allowed: 1 to 1048576"},
      {"match { tokens: [7, 2147483648] }",
       "Match: tokens[1] is 2147483648; allowed: 0 to 2147483647"},
      {"lease {}", "LeaseBlocks: count is 0; allowed: 1 to 4"},
      {"lease { count: 4294967295 }", "LeaseBlocks: count is 4294967295; allowed: 1 to 4"},
      {"commit {}", "Commit: no blocks"},
      {"commit { blocks { id: 4294967295 } }", "Commit: block id is 4294967295; allowed: 0 to 3"},
      {"commit { blocks { id: 1 } blocks { id: 1 } tokens: [1,2,3,4] }",
       "Commit: block 1 is named twice"},
      {"commit { blocks { id: 1 } tokens: [1] }", "Commit: 1 tokens for 1 blocks of 2"},
      {"commit { blocks { id: 1 } tokens: [1, 4294967295] }",
       "Commit: tokens[1] is 4294967295; allowed: 0 to 2147483647"},
      {"commit { blocks { id: 1 generation: 77 } tokens: [1, 2] }", "of generation 77 is stale"},
      {"commit { blocks { id: 1 } tokens: [1, 2] salt: '" + long_salt + "' }",
       "Commit: the length of salt is 129"},
      {"release { entries: [1, 0] }", "Release: entries[1] is 0, which names none"},
      {"release { entries: 12345 }", "no entry 12345 to release"},
      {"return_blocks { blocks { id: 4 } }", "ReturnBlocks: block id is 4; allowed: 0 to 3"},
      {"return_blocks { blocks { id: 1 } blocks { id: 1 } }",
       "ReturnBlocks: block 1 is named twice"},
      {"copy_done { copy_ids: [5, 5] }", "CopyDone: copy_id 5 is named twice"},
      {"copy_done { copy_ids: 0 }", "CopyDone: copy_ids[0] is 0, which names none"},
      {"copy_done { copy_ids: 5 }", "CopyDone: no copy 5 was ordered"},
      {"distrust_steps {}", "DistrustSteps: first_step is 0; allowed: 1 to 9223372036854775807"},
      {"distrust_steps { first_step: 18446744073709551615 }",
       "DistrustSteps: first_step is 18446744073709551615; allowed: 1 to 9223372036854775807"},
      {"commit { blocks { id: 1 } tokens: [1, 2] step: 9223372036854775808 }",
       "Commit: step is 9223372036854775808; allowed: 0 to 9223372036854775807"},
      {"copy_done { step: 9223372036854775808 }",
       "CopyDone: step is 9223372036854775808; allowed: 0 to 9223372036854775807"},
      {"reconcile {}", "Reconcile: comes once, after an OpenPool whose answer says resumed"},
      {"open { api_epoch: 10 }", "OpenPool: num_blocks is 0; allowed: 1 to 2147483647"},
      {std::string(kOpen) + "}", "OpenPool: this session has the pool open already"},
  };
  const std::string before = owner_->Stats().DebugString();
  for (const Case& c : cases) {
    const proto::CacheReply reply = Handle(kMe, c.request);
    EXPECT_THAT(reply.refusal().text(), HasSubstr(c.text)) << c.request;
    EXPECT_NE(reply.refusal().status_code(), 0u) << c.request;
    proto::StatsReply after = owner_->Stats();
    after.set_refused_stale(0);  // counts, and changes nothing else
    EXPECT_EQ(after.DebugString(), before) << c.request;
  }
}

TEST_F(PoolOwnerTest, RefusesPoolsThatCannotBe) {
  struct Case {
    const char* open;
    const char* text;
  };
  const Case cases[] = {
      {"num_blocks: 1", "api_epoch is 0"},
      {"api_epoch: 1 num_blocks: 2147483648", "num_blocks is 2147483648; allowed: 1 to 2147483647"},
      {"api_epoch: 1 num_blocks: 1", "the number of block_bytes_by_rank is 0; allowed: 1 to 4"},
      {"api_epoch: 1 num_blocks: 1 block_bytes_by_rank: [1,1,1,1,1]",
       "the number of block_bytes_by_rank is 5; allowed: 1 to 4"},
      {"api_epoch: 1 num_blocks: 1 block_bytes_by_rank: [4096, 0]",
       "block_bytes_by_rank[1] is 0; allowed: 1 to 1099511627776"},
      {"api_epoch: 1 num_blocks: 1 block_bytes_by_rank: 18446744073709551615",
       "block_bytes_by_rank[0] is 18446744073709551615; allowed: 1 to"},
      {"api_epoch: 1 num_blocks: 1 block_bytes_by_rank: 1",
       "block_size_tokens is 0; allowed: 1 to 4096"},
      {"api_epoch: 1 num_blocks: 1 block_bytes_by_rank: 1 block_size_tokens: 4097",
       "block_size_tokens is 4097; allowed: 1 to 4096"},
      {"api_epoch: 1 num_blocks: 1 block_bytes_by_rank: 1 block_size_tokens: 1 "
       "host_bytes: 18446744073709551615",
       "host_bytes is 18446744073709551615; allowed: 0 to"},
      {"api_epoch: 1 num_blocks: 1048576 block_bytes_by_rank: 1073741824 block_size_tokens: 64",
       "KV pool of 1048576.00 GiB does not fit into the"},
      {"api_epoch: 1 num_blocks: 1 block_bytes_by_rank: 1 block_size_tokens: 1 "
       "adopt_pool_epoch: 5",
       "OpenPool: adopt_pool_epoch is 0x5 without resume_only"},
      {"api_epoch: 1 num_blocks: 1 block_bytes_by_rank: 1 block_size_tokens: 1 adopt_any: true",
       "OpenPool: adopt_any without resume_only"},
      {"api_epoch: 1 num_blocks: 1 block_bytes_by_rank: 1 block_size_tokens: 1 adopt_any: true "
       "resume_only: true adopt_pool_epoch: 5",
       "OpenPool: adopt_pool_epoch is 0x5 with adopt_any"},
      {"api_epoch: 1 resume_only: true block_bytes_by_rank: 1 block_size_tokens: 1",
       "num_blocks is 0; allowed: 1 to 2147483647"},
      {"api_epoch: 1 num_blocks: 1 block_bytes_by_rank: 1 block_size_tokens: 1 "
       "host_bytes: 1125899906842624",
       "lower --swap-space"},
      // The index of that many blocks would not fit, though their bytes would.
      {"api_epoch: 1 num_blocks: 2147483647 block_bytes_by_rank: 1 block_size_tokens: 4096",
       "does not fit into the"},
  };
  for (const Case& c : cases) {
    EXPECT_THAT(Refusal(kMe, fmt::format("open {{ {} }}", c.open)), HasSubstr(c.text));
    EXPECT_EQ(owner_->Stats().pool_epoch(), 0u) << c.open;
  }
  const std::string seed(4097, 'x');
  EXPECT_THAT(Refusal(kMe, kOpen + ("root_seed: '" + seed + "' }")),
              HasSubstr("the length of root_seed is 4097; allowed: 0 to 4096"));
}

TEST_F(PoolOwnerTest, NothingIsServedBeforeOpenPoolAndBeforeReconcile) {
  const char* const requests[] = {"peek { tokens: 1 }",
                                  "match { tokens: 1 }",
                                  "lease { count: 1 }",
                                  "commit {}",
                                  "release { entries: 1 }",
                                  "return_blocks {}",
                                  "copy_done { copy_ids: 1 }",
                                  "fence {}",
                                  "distrust_steps { first_step: 1 }"};
  for (const char* request : requests) {
    EXPECT_EQ(Refusal(kMe, request), "this session has no pool open; OpenPool comes first");
  }
  EXPECT_EQ(Refusal(kMe, "reconcile {}"), "this session has no pool open; OpenPool comes first");
  Open();
  owner_->SuspendSession(kMe);
  EXPECT_TRUE(Handle(kLater, std::string(kOpen) + "}").opened().resumed());
  for (const char* request : requests) {
    EXPECT_EQ(Refusal(kLater, request), "the pool was taken up again; Reconcile comes first");
  }
  EXPECT_EQ(Refusal(kLater, "reconcile {}"), "");
  EXPECT_EQ(Refusal(kLater, "lease { count: 1 }"), "");
}

TEST_F(PoolOwnerTest, TheGraceEndsAfterFiveSecondsAndNotBefore) {
  Open();
  const uint64_t pool_epoch = owner_->Stats().pool_epoch();
  ASSERT_EQ(Refusal(kMe, "lease { count: 1 }"), "");
  owner_->SuspendSession(kMe);
  EXPECT_EQ(owner_->EndExpiredSession(), now_ + seconds(5));
  now_ += seconds(5) - milliseconds(1);
  EXPECT_NE(owner_->EndExpiredSession(), std::nullopt);
  EXPECT_EQ(owner_->Stats().num_leased(), 1u);
  now_ += milliseconds(1);
  EXPECT_EQ(owner_->EndExpiredSession(), std::nullopt);
  EXPECT_EQ(owner_->Stats().pool_epoch(), pool_epoch);
  EXPECT_EQ(owner_->Stats().num_quarantined(), 1u);
  const proto::CacheReply again = Handle(kLater, std::string(kOpen) + "}");
  EXPECT_FALSE(again.opened().resumed());
  EXPECT_NE(again.opened().pool_epoch(), pool_epoch) << "its own is over: it gets another one";
}

// Workers may still map a pool that is gone; whoever asks for it must not get a second one.
TEST_F(PoolOwnerTest, ResumeOnlyTakesUpAPoolAndNeverCreatesOne) {
  const std::string resume = std::string(kOpen) + " resume_only: true }";
  EXPECT_EQ(Handle(kMe, resume).refusal().status_code(),
            static_cast<uint32_t>(absl::StatusCode::kNotFound));
  EXPECT_EQ(Refusal(kMe, resume), "OpenPool: no pool of api_epoch 0xa");
  EXPECT_EQ(owner_->Stats().pool_epoch(), 0u);
  Open();
  owner_->SuspendSession(kMe);
  EXPECT_TRUE(Handle(kLater, resume).opened().resumed());
}

TEST_F(PoolOwnerTest, AnotherApiEpochIsRefusedWhileOneIsOpenOrInGrace) {
  Open();
  const std::string other =
      "open { api_epoch: 11 num_blocks: 1 block_bytes_by_rank: 4096 "
      "block_size_tokens: 2 }";
  EXPECT_EQ(Refusal(kLater, other), "OpenPool: the session of api_epoch 0xa has the pool open");
  owner_->SuspendSession(kMe);
  EXPECT_EQ(Refusal(kLater, other),
            "OpenPool: the session of api_epoch 0xa has the pool for a few seconds more, should "
            "it reconnect");
  owner_->EndSession(kMe);
  EXPECT_EQ(Refusal(kLater, other), "");
}

// A stream may be taken over before its end is noticed; what comes on it later has no effect.
TEST_F(PoolOwnerTest, ASessionThatWasTakenOverCanDoNothingMore) {
  Open();
  ASSERT_TRUE(Handle(kLater, std::string(kOpen) + "}").opened().resumed());
  EXPECT_EQ(Refusal(kMe, "lease { count: 1 }"),
            "this session has no pool open; OpenPool comes first");
  ASSERT_EQ(Refusal(kLater, "reconcile {}"), "");
  owner_->SuspendSession(kMe);
  owner_->EndSession(kMe);
  EXPECT_EQ(owner_->EndExpiredSession(), std::nullopt);
  EXPECT_EQ(Handle(kLater, "lease { count: 4 }").leased().blocks_size(), 4);
}

// The client states what it holds; a lease whose answer it never saw is not lost.
TEST_F(PoolOwnerTest, ReconcileKeepsWhatIsClaimedAndDropsTheRest) {
  Open();
  const auto entries = Store(kMe, 2);
  const auto leased = Handle(kMe, "lease { count: 2 }").leased();
  owner_->SuspendSession(kMe);
  ASSERT_TRUE(Handle(kLater, std::string(kOpen) + "}").opened().resumed());
  EXPECT_EQ(Refusal(kLater, "reconcile { pinned_entry: 1 }"),
            "Reconcile: 1 entries of pinned_entry, 0 of pin_count");
  EXPECT_EQ(Refusal(kLater, "reconcile { pinned_entry: 1 pin_count: 0 }"),
            "Reconcile: pin_count[0] is 0; allowed: 1 to 2147483647");
  EXPECT_EQ(Refusal(kLater, "reconcile { pinned_entry: [1, 1] pin_count: [1, 1] }"),
            "Reconcile: entry 1 is named twice");
  EXPECT_THAT(Refusal(kLater, "reconcile { pinned_entry: 999 pin_count: 1 }"),
              HasSubstr("there is no such entry"));
  const std::string claim = fmt::format(
      "reconcile {{ pinned_entry: {} pin_count: 1 leased {{ id: {} generation: {} }} }}",
      entries[0], leased.blocks(0).id(), leased.blocks(0).generation());
  EXPECT_EQ(Refusal(kLater, claim), "");
  const proto::StatsReply stats = owner_->Stats();
  EXPECT_EQ(stats.num_committed_pinned(), 1u);
  EXPECT_EQ(stats.num_committed_unpinned(), 1u);
  EXPECT_EQ(stats.num_leased(), 1u);
  EXPECT_EQ(stats.num_free(), 1u);
  now_ += seconds(60);
  EXPECT_EQ(owner_->EndExpiredSession(), std::nullopt) << "the grace is over with the Reconcile";
}

TEST_F(PoolOwnerTest, ASessionThatNeverReconcilesLosesWhatItHeld) {
  Open();
  ASSERT_EQ(Refusal(kMe, "lease { count: 3 }"), "");
  owner_->SuspendSession(kMe);
  now_ += seconds(3);
  ASSERT_TRUE(Handle(kLater, std::string(kOpen) + "}").opened().resumed());
  owner_->SuspendSession(kLater);  // does not begin another grace
  now_ += seconds(2);
  EXPECT_EQ(owner_->EndExpiredSession(), std::nullopt);
  EXPECT_EQ(owner_->Stats().num_quarantined(), 3u);
  EXPECT_EQ(Refusal(kLater, "reconcile {}"), "this session has no pool open; OpenPool comes first");
}

TEST_F(PoolOwnerTest, OtherParametersOfTheSameApiEpochAreRefused) {
  Open();
  owner_->SuspendSession(kMe);
  EXPECT_EQ(Refusal(kLater, kOpen + std::string("root_seed: 'other' }")),
            "OpenPool: api_epoch 0xa has opened its pool with other parameters: root_seed is "
            "another one: its content is that of another model, or is computed in another way");
}

// 16 blocks of 2 tokens and as many host slots: write-backs run 2 blocks ahead.
constexpr char kOpenTiered[] =
    "open { api_epoch: 10 num_blocks: 16 block_bytes_by_rank: 4096 block_size_tokens: 2 "
    "host_bytes: 65536 }";

TEST_F(PoolOwnerTest, PushesWriteBacksAfterTheRequestThatMadeThemDue) {
  ASSERT_EQ(Refusal(kMe, kOpenTiered), "");
  EXPECT_EQ(owner_->Stats().num_host_slots(), 16u);
  const auto replies = HandleAll(kMe, Release(Store(kMe, 16)));
  ASSERT_THAT(replies, SizeIs(2));
  EXPECT_TRUE(replies[0].has_done());
  EXPECT_EQ(replies[1].seq(), 0u);
  EXPECT_EQ(replies[1].num_available(), 14u) << "blocks being copied cannot be evicted";
  ASSERT_EQ(replies[1].copy_out().copies_size(), 2);
  for (const auto& copy : replies[1].copy_out().copies()) EXPECT_FALSE(copy.to_device());
  EXPECT_NE(replies[1].copy_out().copies(0).host_slot(),
            replies[1].copy_out().copies(1).host_slot());
  EXPECT_THAT(HandleAll(kMe, "ping {}"), SizeIs(1)) << "pushed twice";
  const auto more = HandleAll(kMe, CopyDone(replies[1]));
  ASSERT_THAT(more, SizeIs(2)) << "of the same release";
  EXPECT_EQ(more[1].copy_out().copies_size(), 2);
  EXPECT_EQ(Refusal(kMe, CopyDone(replies[1])), "") << "said again in doubt";
  EXPECT_EQ(owner_->Stats().num_host_valid(), 2u);
}

// A push that was lost with its stream is ordered again, one that arrived is not.
TEST_F(PoolOwnerTest, OrdersLostWriteBacksAgainAfterReconcile) {
  ASSERT_EQ(Refusal(kMe, kOpenTiered), "");
  const auto pushed = HandleAll(kMe, Release(Store(kMe, 16)));
  ASSERT_THAT(pushed, SizeIs(2));
  ASSERT_EQ(pushed[1].copy_out().copies_size(), 2);
  const uint64_t first = pushed[1].copy_out().copies(0).copy_id();
  owner_->SuspendSession(kMe);
  ASSERT_EQ(Refusal(kLater, kOpenTiered), "");
  const auto replies = HandleAll(kLater, fmt::format("reconcile {{ last_copy_id: {} }}", first));
  ASSERT_THAT(replies, SizeIs(2));
  ASSERT_EQ(replies[1].copy_out().copies_size(), 1);
  EXPECT_EQ(replies[1].copy_out().copies(0).DebugString(),
            pushed[1].copy_out().copies(1).DebugString());
}

TEST_F(PoolOwnerTest, PushesAFewWriteBacksAtATimeAndLostOnesToo) {
  const std::string open =
      "open { api_epoch: 10 num_blocks: 512 block_bytes_by_rank: 64 block_size_tokens: 2 "
      "host_bytes: 32768 }";
  ASSERT_EQ(Refusal(kMe, open), "");
  const auto num_pushed = [](const std::vector<proto::CacheReply>& replies) {
    return replies.size() < 2 ? 0 : static_cast<size_t>(replies[1].copy_out().copies_size());
  };
  EXPECT_EQ(num_pushed(HandleAll(kMe, Release(Store(kMe, 512)))), kMaxCopiesPerPush);
  EXPECT_EQ(num_pushed(HandleAll(kMe, "ping {}")), kMaxWriteBacksUnderWay - kMaxCopiesPerPush);
  EXPECT_EQ(num_pushed(HandleAll(kMe, "ping {}")), 0u);
  owner_->SuspendSession(kMe);
  ASSERT_EQ(Refusal(kLater, open), "");
  EXPECT_EQ(num_pushed(HandleAll(kLater, "reconcile {}")), kMaxCopiesPerPush);
  EXPECT_EQ(num_pushed(HandleAll(kLater, "fence {}")), kMaxWriteBacksUnderWay - kMaxCopiesPerPush);
  EXPECT_EQ(num_pushed(HandleAll(kLater, "ping {}")), 0u);
}

TEST_F(PoolOwnerTest, FenceFreesWhatAReconcileQuarantined) {
  ASSERT_EQ(Refusal(kMe, kOpenTiered), "");
  auto replies = HandleAll(kMe, Release(Store(kMe, 16)));
  while (replies.size() > 1) replies = HandleAll(kMe, CopyDone(replies[1]));
  ASSERT_EQ(owner_->Stats().num_host_valid(), 16u);
  // The device copies are evicted, so that the next match restores.
  const auto leased = Handle(kMe, "lease { count: 4 }").leased();
  std::string back = "return_blocks {";
  for (const auto& block : leased.blocks()) {
    back += fmt::format(" blocks {{ id: {} generation: {} }}", block.id(), block.generation());
  }
  ASSERT_EQ(Refusal(kMe, back + "}"), "");
  std::string match = "match { allow_restore: true";
  for (int token = 0; token <= 32; ++token) match += fmt::format(" tokens: {}", token);
  const auto matched = Handle(kMe, match + "}").matched();
  EXPECT_EQ(matched.device_size(), 12);
  ASSERT_EQ(matched.copies_size(), 4);
  owner_->SuspendSession(kMe);
  ASSERT_EQ(Refusal(kLater, kOpenTiered), "");
  ASSERT_EQ(Refusal(kLater, "reconcile {}"), "");
  EXPECT_EQ(owner_->Stats().num_quarantined(), 4u);
  ASSERT_EQ(Refusal(kLater, "fence {}"), "");
  EXPECT_EQ(owner_->Stats().num_quarantined(), 0u);
  EXPECT_EQ(owner_->Stats().num_free(), 4u);
}

TEST_F(PoolOwnerTest, AdminFlushesOneSaltOrAll) {
  proto::AdminRequest all;
  all.mutable_flush_all();
  EXPECT_EQ(owner_->Admin(all)->num_entries(), 0u) << "no pool, nothing cached";
  Open();
  Store(kMe, 2);
  proto::AdminRequest salt;
  salt.set_flush_salt("other");
  EXPECT_EQ(owner_->Admin(salt)->num_entries(), 0u);
  EXPECT_EQ(owner_->Admin(all)->num_entries(), 2u);
  EXPECT_EQ(Handle(kMe, "match { tokens: [0,1,2] }").matched().device_size(), 0);
  salt.set_flush_salt(std::string(129, 's'));
  EXPECT_EQ(
      owner_->Admin(salt).status(),
      absl::InvalidArgumentError("Admin.flush_salt: the length of salt is 129; allowed: 0 to 128"));
  EXPECT_EQ(owner_->Admin(proto::AdminRequest()).status().code(), absl::StatusCode::kUnimplemented);
}

TEST_F(PoolOwnerTest, AdminResizesTheHostTierOfTheNextPool) {
  Open();
  proto::AdminRequest resize;
  resize.set_resize_host_bytes(3 * 4096);
  const auto reply = owner_->Admin(resize);
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->text(),
            "the next pool gets a host tier of 12288 bytes if they fit; the pool that is open "
            "keeps its own");
  EXPECT_EQ(owner_->Stats().num_host_slots(), 0u);
  owner_->EndSession(kMe);
  Open(kLater);
  EXPECT_EQ(owner_->Stats().num_host_slots(), 3u);
  resize.set_resize_host_bytes((uint64_t{1} << 50) + 1);
  EXPECT_EQ(owner_->Admin(resize).status().code(), absl::StatusCode::kInvalidArgument);
}

class ResizedHostTier : public PoolOwnerTest {
 protected:
  ResizedHostTier() { StartOwner(path_); }
  ~ResizedHostTier() override { std::filesystem::remove(path_); }

  absl::Status Resize(uint64_t host_bytes) {
    proto::AdminRequest request;
    request.set_resize_host_bytes(host_bytes);
    return owner_->Admin(request).status();
  }

  const std::string path_ = testing::TempDir() + "/host_bytes_" + std::to_string(::getpid());
};

TEST_F(ResizedHostTier, OutlivesTheCacheManager) {
  ASSERT_EQ(Resize(3 * 4096), absl::OkStatus());
  StartOwner(path_);
  Open();
  EXPECT_EQ(owner_->Stats().num_host_slots(), 3u);
  ASSERT_EQ(Resize(0), absl::OkStatus());
  StartOwner(path_);
  Open(kMe, "host_bytes: 16384");
  EXPECT_EQ(owner_->Stats().num_host_slots(), 0u);
}

TEST_F(ResizedHostTier, ThatDoesNotFitLeavesWhatTheInstanceWasStartedWith) {
  ASSERT_EQ(Resize(uint64_t{1} << 50), absl::OkStatus());
  Open(kMe, "host_bytes: 16384");
  EXPECT_EQ(owner_->Stats().num_host_slots(), 4u);
}

TEST_F(ResizedHostTier, IsRefusedWhenItCannotBeKept) {
  StartOwner("/no/such/directory/host_bytes");
  EXPECT_THAT(std::string(Resize(4096).message()),
              HasSubstr("Admin: cannot write /no/such/directory/host_bytes"));
  Open();
  EXPECT_EQ(owner_->Stats().num_host_slots(), 0u);
}

TEST_F(ResizedHostTier, OfAFileThatIsNotOneIsLeftAside) {
  for (const char* text : {"", "much", "-1", "99999999999999999999"}) {
    std::ofstream(path_) << text;
    StartOwner(path_);
    Open();
    EXPECT_EQ(owner_->Stats().num_host_slots(), 0u) << text;
    owner_->EndSession(kMe);
  }
}

TEST_F(PoolOwnerTest, WatchersSeeWhatHappensFromThenOn) {
  Open();
  const auto first = Store(kMe, 1);
  std::vector<Watcher> watchers(PoolOwner::kMaxWatchers);
  for (Watcher& watcher : watchers) ASSERT_TRUE(owner_->Watch(&watcher).ok());
  Watcher late;
  EXPECT_EQ(owner_->Watch(&late).code(), absl::StatusCode::kResourceExhausted);
  ASSERT_EQ(Refusal(kMe, Release(first)), "");
  proto::AdminRequest all;
  all.mutable_flush_all();
  ASSERT_TRUE(owner_->Admin(all).ok());
  owner_->Unwatch(&watchers[1]);
  const auto second = Store(kMe, 1);
  EXPECT_EQ(watchers[0].kinds, fmt::format("-{} +{} ", first[0], second[0]));
  EXPECT_EQ(watchers[1].kinds, fmt::format("-{} ", first[0]));
}

}  // namespace
}  // namespace wintserve
