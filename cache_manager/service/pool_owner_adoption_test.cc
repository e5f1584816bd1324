// A pool whose API server is gone, and the one that adopts it.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "cache_manager/service/pool_owner_test_util.h"

namespace wintserve {
namespace {

using std::chrono::seconds;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// 16 blocks of 2 tokens and as many host slots: write-backs run 2 blocks ahead.
constexpr char kLayout[] =
    "block_bytes_by_rank: 4096 block_size_tokens: 2 host_bytes: 65536 root_seed: 'model' ";

class Adoption : public PoolOwnerTest {
 protected:
  void SetUp() override {
    const auto reply = Handle(kMe, Join({"open { api_epoch: 10 num_blocks: 16", kLayout, "}"}));
    ASSERT_TRUE(reply.has_opened()) << reply.DebugString();
    pool_epoch_ = reply.opened().pool_epoch();
  }

  static std::string Join(const std::vector<std::string>& parts) {
    std::string text;
    for (const std::string& part : parts) text += part + " ";
    return text;
  }
  // By api_epoch 11, of that layout and `more`.
  std::string AdoptText(const std::string& more = "", uint64_t pool_epoch = 0) const {
    return Join({"open { api_epoch: 11 resume_only: true", kLayout,
                 fmt::format("adopt_pool_epoch: {}", pool_epoch == 0 ? pool_epoch_ : pool_epoch),
                 more, "}"});
  }
  void Adopt(uint64_t session = kLater) {
    const auto reply = Handle(session, AdoptText());
    ASSERT_TRUE(reply.has_opened()) << reply.DebugString();
    EXPECT_EQ(reply.opened().pool_epoch(), pool_epoch_);
    EXPECT_EQ(reply.opened().num_blocks(), 16u);
    EXPECT_EQ(reply.opened().num_host_slots(), 16u);
    EXPECT_FALSE(reply.opened().resumed()) << "there is nothing to reconcile";
  }
  absl::StatusCode CodeOf(const std::string& text) {
    return static_cast<absl::StatusCode>(Handle(kLater, text).refusal().status_code());
  }

  uint64_t pool_epoch_ = 0;
};

TEST_F(Adoption, KeepsWhatWasCommittedAndQuarantinesWhatWasLeasedUntilFence) {
  Store(kMe, 3);  // pinned
  ASSERT_EQ(Handle(kMe, "lease { count: 5 }").leased().blocks_size(), 5);
  owner_->SuspendSession(kMe);
  owner_->EndSession(kMe);
  EXPECT_EQ(owner_->Stats().pool_epoch(), pool_epoch_);
  Adopt();
  proto::StatsReply stats = owner_->Stats();
  EXPECT_EQ(stats.num_committed_pinned(), 0u);
  EXPECT_EQ(stats.num_committed_unpinned(), 3u);
  EXPECT_EQ(stats.num_quarantined(), 5u);
  EXPECT_EQ(stats.num_leased(), 0u);
  EXPECT_EQ(stats.num_free(), 8u);

  EXPECT_EQ(Handle(kLater, "match { tokens: [0,1,2,3,4,5,6] }").matched().device_size(), 3);
  EXPECT_EQ(Handle(kLater, "lease { count: 16 }").leased().blocks_size(), 8)
      << "the quarantined blocks are given to nobody";
  EXPECT_EQ(Refusal(kLater, "fence {}"), "");
  EXPECT_EQ(Handle(kLater, "lease { count: 16 }").leased().blocks_size(), 5);
}

TEST_F(Adoption, OfASessionThatEndedByItselfIsTheSame) {
  Store(kMe, 3);
  owner_->EndSession(kMe);
  now_ += seconds(100'000);
  EXPECT_EQ(owner_->EndExpiredSession(), std::nullopt) << "it waits as long as the cache manager";
  Adopt();
  EXPECT_EQ(Handle(kLater, "match { tokens: [0,1,2,3,4,5,6] }").matched().device_size(), 3);
}

// The new API server is there long before the 5 s are over: nobody else can come back for them.
TEST_F(Adoption, NeedNotWaitForTheGraceOfABrokenStream) {
  ASSERT_EQ(Handle(kMe, "lease { count: 5 }").leased().blocks_size(), 5);
  owner_->SuspendSession(kMe);
  Adopt();
  EXPECT_EQ(owner_->Stats().num_quarantined(), 5u);
  now_ += seconds(60);
  EXPECT_EQ(owner_->EndExpiredSession(), std::nullopt);
  EXPECT_EQ(Refusal(kLater, "lease { count: 1 }"), "") << "the grace was the other one's";
  owner_->EndSession(kMe);
  EXPECT_EQ(Refusal(kLater, "lease { count: 1 }"), "");
  EXPECT_THAT(Refusal(3, Join({"open { api_epoch: 10 num_blocks: 16", kLayout, "}"})),
              HasSubstr("the session of api_epoch 0xb has the pool open"));
}

TEST_F(Adoption, IsRefusedWhileTheSessionIsAlive) {
  EXPECT_EQ(Refusal(kLater, AdoptText()),
            fmt::format("OpenPool: pool {:#x} is not to be adopted: the session of api_epoch 0xa "
                        "is still connected",
                        pool_epoch_));
  EXPECT_EQ(CodeOf(AdoptText()), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Refusal(kMe, AdoptText()), "OpenPool: this session has the pool open already");
  // Taken over by another stream of its own, which has not reconciled yet: alive as well.
  owner_->SuspendSession(kMe);
  ASSERT_EQ(Refusal(3, Join({"open { api_epoch: 10 num_blocks: 16", kLayout, "}"})), "");
  EXPECT_EQ(CodeOf(AdoptText()), absl::StatusCode::kFailedPrecondition);
  ASSERT_EQ(Refusal(3, "reconcile {}"), "");
  EXPECT_EQ(CodeOf(AdoptText()), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Refusal(3, "lease { count: 1 }"), "") << "none of it had an effect";
}

// All workers have gone with their API server: nobody is left to name the pool.
TEST_F(Adoption, OfWhicheverPoolThereIsNeedsNobodyToNameIt) {
  const std::string any =
      Join({"open { api_epoch: 11 resume_only: true adopt_any: true", kLayout, "}"});
  Store(kMe, 3);
  ASSERT_EQ(Handle(kMe, "lease { count: 5 }").leased().blocks_size(), 5);
  EXPECT_EQ(CodeOf(any), absl::StatusCode::kFailedPrecondition) << "its session is alive";
  proto::CacheRequest other = Parse(any);
  other.mutable_open()->set_root_seed("other");
  proto::Refusal refusal = owner_->Handle(kLater, other)[0].refusal();
  EXPECT_EQ(refusal.status_code(), static_cast<uint32_t>(absl::StatusCode::kNotFound))
      << "to wait for its end would be of no use";
  EXPECT_THAT(refusal.text(), HasSubstr("root_seed is another one"));
  owner_->SuspendSession(kMe);
  for (const uint64_t session : {kLater, uint64_t{3}}) {  // the first answer may be lost
    const auto reply = Handle(session, any);
    ASSERT_TRUE(reply.has_opened()) << reply.DebugString();
    EXPECT_EQ(reply.opened().pool_epoch(), pool_epoch_);
    EXPECT_FALSE(reply.opened().resumed());
    owner_->SuspendSession(session);
  }
  ASSERT_TRUE(Handle(4, any).has_opened());
  EXPECT_EQ(owner_->Stats().num_quarantined(), 5u);
  EXPECT_EQ(Handle(4, "match { tokens: [0,1,2,3,4,5,6] }").matched().device_size(), 3);
  StartOwner();
  EXPECT_EQ(Refusal(kLater, any), "OpenPool: no pool to adopt");
  EXPECT_EQ(CodeOf(any), absl::StatusCode::kNotFound);
}

TEST_F(Adoption, OfAnUnknownPoolIsNotFound) {
  EXPECT_EQ(CodeOf(AdoptText("", 77)), absl::StatusCode::kNotFound) << "alive or not";
  owner_->EndSession(kMe);
  EXPECT_EQ(CodeOf(AdoptText("", 77)), absl::StatusCode::kNotFound);
  EXPECT_EQ(Refusal(kLater, AdoptText("", ~uint64_t{0})),
            fmt::format("OpenPool: no pool 0xffffffffffffffff to adopt; there is pool {:#x}",
                        pool_epoch_));
  StartOwner();
  EXPECT_EQ(Refusal(kLater, AdoptText()),
            fmt::format("OpenPool: no pool {:#x} to adopt; there is none", pool_epoch_));
  EXPECT_EQ(CodeOf(AdoptText()), absl::StatusCode::kNotFound);
}

TEST_F(Adoption, OfAnotherLayoutIsRefusedAndSaysWhatDiffers) {
  owner_->EndSession(kMe);
  struct Case {
    void (*change)(proto::OpenPool*);
    const char* text;
  };
  const Case cases[] = {
      {[](auto* open) { open->set_num_blocks(17); }, "num_blocks is 16, and 17 are asked for"},
      {[](auto* open) { open->add_block_bytes_by_rank(8192); },
       "block_bytes_by_rank is 4096, and 4096, 8192 is asked for"},
      {[](auto* open) { open->set_block_bytes_by_rank(0, 4097); },
       "block_bytes_by_rank is 4096, and 4097 is asked for"},
      {[](auto* open) { open->set_block_size_tokens(4); },
       "block_size_tokens is 2, and 4 is asked for"},
      {[](auto* open) { open->set_host_bytes(0); }, "host_bytes is 65536, and 0 is asked for"},
      {[](auto* open) { open->set_root_seed("other"); },
       "root_seed is another one: its content is that of another model, or is computed in another "
       "way"},
  };
  const std::string before = owner_->Stats().DebugString();
  for (const Case& c : cases) {
    proto::CacheRequest request = Parse(AdoptText());
    c.change(request.mutable_open());
    const proto::Refusal refusal = owner_->Handle(kLater, request)[0].refusal();
    EXPECT_EQ(refusal.text(),
              fmt::format("OpenPool: pool {:#x} cannot be adopted: {}", pool_epoch_, c.text));
    EXPECT_EQ(refusal.status_code(), static_cast<uint32_t>(absl::StatusCode::kFailedPrecondition));
    EXPECT_EQ(owner_->Stats().DebugString(), before) << c.text;
  }
  EXPECT_EQ(Refusal(kLater, AdoptText("num_blocks: 16")), "");
}

// The adopter's stream broke before the answer came: it asks the same again on another one, and
// need not know whether it had the pool already, nor whether anybody has noticed.
TEST_F(Adoption, AnAnswerThatWasLostIsAskedForAgain) {
  owner_->SuspendSession(kMe);
  Adopt(kLater);
  ASSERT_EQ(Handle(kLater, "lease { count: 2 }").leased().blocks_size(), 2);
  owner_->SuspendSession(kLater);
  Adopt(3);
  EXPECT_EQ(owner_->Stats().num_quarantined(), 2u);
  ASSERT_EQ(Handle(3, "lease { count: 3 }").leased().blocks_size(), 3);
  Adopt(4);
  EXPECT_EQ(owner_->Stats().num_quarantined(), 5u);
  EXPECT_EQ(Refusal(3, "lease { count: 1 }"),
            "this session has no pool open; OpenPool comes first");
  owner_->EndSession(4);
  Adopt(5);
  EXPECT_EQ(Refusal(5, "fence {}"), "");
  EXPECT_EQ(owner_->Stats().num_free(), 16u);
}

// Its steps go on after those of the one before.
TEST_F(Adoption, TellsTheNewestStep) {
  const auto newest_step = [this](uint64_t session) {
    owner_->EndSession(session - 1);
    return Handle(session, AdoptText()).opened().newest_step();
  };
  EXPECT_EQ(newest_step(2), 0u);
  Store(2, 2, /*step=*/700);
  Store(2, 1, /*step=*/699);
  Store(2, 1, /*step=*/0);
  EXPECT_EQ(Refusal(2, "commit { step: 800 }"), "Commit: no blocks");
  EXPECT_EQ(newest_step(3), 700u);
  ASSERT_EQ(Refusal(3, "fence {}"), "");
  const auto replies = HandleAll(3, Release(Store(3, 16, /*step=*/701)));
  ASSERT_THAT(replies, SizeIs(2));
  std::string done = CopyDone(replies[1]);
  done.insert(done.size() - 1, " step: 705");
  EXPECT_EQ(Refusal(3, done), "");
  EXPECT_EQ(newest_step(4), 705u);
  ASSERT_EQ(Refusal(4, "distrust_steps { first_step: 702 }"), "");
  EXPECT_EQ(newest_step(5), 705u);
}

TEST_F(Adoption, AfterAdoptionWhatIsNotFencedStaysSo) {
  for (uint64_t session = 2; session <= 4; ++session) {
    ASSERT_EQ(Handle(session - 1, "lease { count: 2 }").leased().blocks_size(), 2);
    owner_->SuspendSession(session - 1);
    now_ += seconds(10);
    owner_->EndExpiredSession();
    const std::string adopt =
        Join({fmt::format("open {{ api_epoch: {} resume_only: true adopt_pool_epoch: {}",
                          10 + session, pool_epoch_),
              kLayout, "}"});
    ASSERT_EQ(Refusal(session, adopt), "");
    EXPECT_EQ(owner_->Stats().num_quarantined(), 2 * (session - 1));
  }
  ASSERT_EQ(Refusal(4, "fence {}"), "");
  EXPECT_EQ(owner_->Stats().num_free(), 16u);
}

// The workers may still run the copies of a session that is over. Nobody who follows can have heard
// that they are done.
TEST_F(Adoption, CopiesOfTheSessionBeforeEndWithFenceAlone) {
  const auto replies = HandleAll(kMe, Release(Store(kMe, 16)));
  ASSERT_THAT(replies, SizeIs(2));
  ASSERT_EQ(replies[1].copy_out().copies_size(), 2);
  owner_->SuspendSession(kMe);
  const auto adopted = HandleAll(kLater, AdoptText());
  proto::StatsReply stats = owner_->Stats();
  EXPECT_EQ(stats.num_copying_out(), 2u);
  EXPECT_EQ(stats.num_host_quarantined(), 2u);
  EXPECT_EQ(stats.num_host_filling(), 0u) << adopted.back().DebugString();
  EXPECT_EQ(Refusal(kLater, CopyDone(replies[1])),
            "CopyDone: copy 1 was ordered from a session that is over; Fence ends it");
  EXPECT_EQ(owner_->Stats().num_host_quarantined(), 2u);

  const auto fenced = HandleAll(kLater, "fence {}");
  ASSERT_THAT(fenced, SizeIs(2)) << "the write-backs are as due as they were";
  for (const auto& copy : fenced[1].copy_out().copies()) EXPECT_GT(copy.copy_id(), 2u);
  EXPECT_EQ(Refusal(kLater, CopyDone(fenced[1])), "");
  EXPECT_EQ(owner_->Stats().num_host_valid(), 2u);
  EXPECT_EQ(owner_->Stats().num_host_quarantined(), 0u);
}

TEST_F(Adoption, APoolThatNobodyAdoptsMakesRoomForANewOne) {
  Store(kMe, 2);
  owner_->EndSession(kMe);
  EXPECT_EQ(Refusal(kLater, Join({"open { api_epoch: 11 num_blocks: 0", kLayout, "}"})),
            "OpenPool: num_blocks is 0; allowed: 1 to 2147483647");
  EXPECT_EQ(
      Refusal(kLater, Join({"open { api_epoch: 11 num_blocks: 4 resume_only: true", kLayout, "}"})),
      "OpenPool: no pool of api_epoch 0xb");
  EXPECT_EQ(owner_->Stats().pool_epoch(), pool_epoch_) << "for want of a better one";
  const auto reply = Handle(kLater, Join({"open { api_epoch: 11 num_blocks: 4", kLayout, "}"}));
  ASSERT_TRUE(reply.has_opened()) << reply.DebugString();
  EXPECT_NE(reply.opened().pool_epoch(), pool_epoch_);
  EXPECT_EQ(owner_->Stats().num_free(), 4u);
  EXPECT_EQ(CodeOf(AdoptText()), absl::StatusCode::kFailedPrecondition) << "it has a pool";
}

TEST_F(Adoption, WatchersFollowThePoolThroughIt) {
  Watcher watcher;
  ASSERT_TRUE(owner_->Watch(&watcher).ok());
  const auto entries = Store(kMe, 2, /*step=*/7);
  owner_->SuspendSession(kMe);
  Adopt();
  EXPECT_EQ(watcher.kinds, fmt::format("+{} +{} ", entries[0], entries[1]))
      << "nothing has changed for whoever looks for prefixes";
  proto::AdminRequest all;
  all.mutable_flush_all();
  ASSERT_TRUE(owner_->Admin(all).ok());
  EXPECT_EQ(watcher.kinds, fmt::format("+{0} +{1} -{1} -{0} ", entries[0], entries[1]));
  EXPECT_EQ(watcher.num_lost, 0);
  owner_->Unwatch(&watcher);
}

TEST_F(Adoption, StepsThatAreNotTrustedAreForgottenHoweverOftenItIsSaid) {
  Watcher watcher;
  ASSERT_TRUE(owner_->Watch(&watcher).ok());
  const auto entries = Store(kMe, 2, /*step=*/300);
  ASSERT_EQ(Refusal(kMe, "distrust_steps { first_step: 301 }"), "");
  ASSERT_EQ(Refusal(kMe, "distrust_steps { first_step: 9223372036854775807 }"), "");
  EXPECT_EQ(Handle(kMe, "peek { tokens: [0,1,2,3,4] }").peeked().device_blocks(), 2u);
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(Refusal(kMe, "distrust_steps { first_step: 300 }"), "");
    EXPECT_EQ(Handle(kMe, "peek { tokens: [0,1,2,3,4] }").peeked().device_blocks(), 0u);
    EXPECT_EQ(owner_->Stats().num_entries(), 0u);
    EXPECT_EQ(owner_->Stats().num_committed_pinned(), 2u) << "until the pins are gone";
  }
  EXPECT_EQ(watcher.kinds, fmt::format("+{0} +{1} -{1} -{0} ", entries[0], entries[1]));
  ASSERT_EQ(Refusal(kMe, Release(entries)), "");
  EXPECT_EQ(owner_->Stats().num_free(), 16u);
  owner_->Unwatch(&watcher);
}

}  // namespace
}  // namespace wintserve
