// Sequences of events by which KV would be overwritten, or read though it is wrong, between the
// death of a process and the plans that come after it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "api_server/llm/llm_recovery_test_util.h"
#include "api_server/work_queue/messages.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

// Whatever is expected not to happen has this long to happen; each of the steps that would lead to
// it takes less than 10 ms.
constexpr milliseconds kAWhile(100);

// A letter that depends on every token before it: wrong KV is wrong text.
int32_t LetterOfHistory(const std::vector<int32_t>& history) {
  uint32_t hash = 0;
  for (const int32_t token : history) hash = hash * 31 + static_cast<uint32_t>(token);
  return FakeTokenizer::IdOfByte(static_cast<char>('a' + (hash >> 8) % 26));
}

class HoleTest : public RecoveryTest {
 protected:
  FakeWorkerOptions HistoryWorker(uint32_t rank) {
    FakeWorkerOptions worker = SlowWorker(rank);
    worker.next_token = LetterOfHistory;
    return worker;
  }
  // What a process may do to all memory that it maps before it is found out. Every rank samples
  // here, from its own memory: spoilt on one of them alone it would show as ranks that disagree.
  void Scribble() {
    const PoolSpec spec = cache_.spec();
    for (auto& [rank, memory] : memory_) {
      auto pool = memory->Map({.pool_epoch = 98 + cache_.num_pools(),
                               .memory_socket = "",
                               .num_blocks = spec.num_blocks});
      ASSERT_TRUE(pool.ok()) << pool.status();
      auto* const tokens = static_cast<int32_t*>((*pool)->blocks.data());
      std::fill(tokens, tokens + int64_t{spec.num_blocks} * spec.block_size_tokens, 1 + 'z');
    }
  }
  // Both the prompt's answer and how much of the prompt was cached.
  struct Answer {
    std::string text;
    int num_cached_tokens = 0;
  };
  Answer Ask(const std::string& prompt, int max_tokens) {
    Updates updates;
    Submit(Request(prompt, max_tokens), &updates);
    EXPECT_TRUE(updates.WaitFinished());
    EXPECT_TRUE(updates.last().error.ok()) << updates.last().error;
    return {updates.choice(0).text, updates.last().num_cached_tokens};
  }
  // The engine ends with a stream open, as if its process had been killed; the workers' streams
  // end, and they are to attach anew.
  void EndApiServer() {
    llm_.reset();
    for (auto& worker : workers_) worker->WaitForShutdown();
    workers_.clear();
    registry_ = std::make_shared<prometheus::Registry>();
  }
};

// The process of rank 1 is dying, and its device still writes to the blocks of a request. The
// request is cancelled: whoever got its blocks now would find foreign keys and values in them.
TEST_F(HoleTest, BlocksOfADeadImporterAreNotLeasedAgainBeforeItIsReaped) {
  StartTwo();
  Updates updates;
  const RequestHandle handle = Submit(Request(std::string(130, 'x'), 60), &updates);
  ASSERT_TRUE(updates.WaitForTokens(5));
  workers_[1]->Kill();  // its stream; nobody has reaped it
  ASSERT_TRUE(WaitFor([&] { return IsRecovering(); }));
  llm_->Cancel(handle);
  std::this_thread::sleep_for(kAWhile);
  EXPECT_GE(cache_.stats().num_leased, 1u) << "the block that the request computed in";
  EXPECT_GE(cache_.stats().num_committed_pinned, 2u) << "the full blocks that it read";
  // It is reaped, and its plans count as done though nobody will ever acknowledge them: what they
  // named comes back before there is another group.
  processes_.TellExit(1, workers_[1]->hello().worker_id, /*kv_trusted=*/true);
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
  EXPECT_TRUE(IsRecovering());
  Replace(1, SlowWorker(1));
  EXPECT_TRUE(WaitUntilReady());
}

// The same with a dead API server in between: its successor knows nothing of what the group was
// computing, and one of the ranks has not been heard of yet.
TEST_F(HoleTest, BlocksThatADeadApiServerHadLeasedAreNotLeasedAgainBeforeEveryRankHasLeftItsGroup) {
  StartTwo();
  Updates updates;
  Submit(Request(std::string(130, 'x'), 60), &updates);
  ASSERT_TRUE(updates.WaitForTokens(5));
  const uint32_t num_blocks = cache_.spec().num_blocks;
  EndApiServer();
  ASSERT_GE(cache_.stats().num_quarantined, 1u);
  const uint64_t pool_epoch = 98 + cache_.num_pools();
  Create();
  const auto come_back = [&](uint32_t rank) {
    FakeWorkerOptions again = SlowWorker(rank);
    again.hello.mapped_pool_epoch = pool_epoch;
    AddWorker(again);
  };
  come_back(0);
  std::this_thread::sleep_for(kAWhile);
  EXPECT_GE(cache_.stats().num_quarantined, 1u) << "rank 1 may still write to it";
  come_back(1);
  ASSERT_TRUE(WaitUntilReady()) << llm_->Readiness().reason;
  EXPECT_TRUE(WaitFor([&] { return cache_.stats().num_quarantined == 0; }));
  EXPECT_EQ(cache_.spec().num_blocks, num_blocks);
  EXPECT_EQ(cache_.num_pools(), 1u);
}

// A rank writes rubbish, crashes, and what it has written is matchable by then: each of its steps
// was acknowledged. Whoever asks for the prompt again must not read it.
TEST_F(HoleTest, APrefixThatACrashedRankMayHaveSpoiltIsNotReadAgain) {
  StartTwo(HistoryWorker(0), HistoryWorker(1));
  const std::string prompt(130, 'x');
  const Answer right = Ask(prompt, 30);
  ASSERT_EQ(Ask(prompt, 30).num_cached_tokens, 128) << "nothing is matchable: this proves nothing";
  Scribble();
  Kill(0, /*kv_trusted=*/false);
  Replace(0, HistoryWorker(0));
  const Answer again = Ask(prompt, 30);
  EXPECT_EQ(again.text, right.text);
  EXPECT_EQ(again.num_cached_tokens, 0);
}

// The cache manager cannot be told so at once, and would serve the prefix to the session that comes
// back to it.
TEST_F(HoleTest, APrefixThatACrashedRankMayHaveSpoiltIsNotReadByTheNextSessionEither) {
  StartTwo(HistoryWorker(0), HistoryWorker(1));
  const std::string prompt(130, 'x');
  const Answer right = Ask(prompt, 30);
  ASSERT_EQ(Ask(prompt, 30).num_cached_tokens, 128);
  cache_.SetReachable(false);
  cache_.DropSession();
  ASSERT_TRUE(WaitForMetric("wintserve:cache_sessions_lost_total", "1"));
  Scribble();
  Kill(0, /*kv_trusted=*/false);
  Replace(0, HistoryWorker(0));
  ASSERT_TRUE(WaitForMetric("wintserve:recovery_seconds_count", "1"));
  cache_.SetReachable(true);
  // Once the cache manager is there again; until then every prompt is computed.
  Answer again;
  ASSERT_TRUE(WaitFor([&] {
    again = Ask(prompt, 30);
    return again.text != right.text || again.num_cached_tokens > 0;
  }));
  EXPECT_EQ(again.text, right.text);
  EXPECT_EQ(cache_.num_pools(), 1u) << "the pool was replaced: this proves nothing";
}

// What was written long before the crash is kept: else every crash would cost the whole cache.
TEST_F(HoleTest, APrefixOfMoreThan256StepsAgoIsStillReadAfterACrash) {
  StartTwo(HistoryWorker(0), HistoryWorker(1));
  const std::string prompt(130, 'x');
  const Answer right = Ask(prompt, 30);
  Ask(std::string(40, 'y'), 140);
  Ask(std::string(40, 'y') + 'z', 140);
  Kill(0, /*kv_trusted=*/false);
  Replace(0, HistoryWorker(0));
  const Answer again = Ask(prompt, 30);
  EXPECT_EQ(again.text, right.text);
  EXPECT_EQ(again.num_cached_tokens, 128);
}

// The device of a rank takes other ids than it was sent, and its process says nothing at all about
// them: what is missing must not pass for what agrees.
TEST_F(HoleTest, ARankThatDoesNotSayWhatItWentOnWithIsNotBelieved) {
  FakeWorkerOptions silent = SlowWorker(1);
  auto steps = std::make_shared<std::atomic<int>>(0);
  silent.spoil = [steps](StepDone* done) {
    if (++*steps == 20) done->sampled_digest = 0;
  };
  StartTwo(SlowWorker(0), silent);
  SubmitStreams();
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"divergence\"}"), "1");
  EXPECT_EQ(Metric("wintserve:resumed_sequences_total{from=\"kv\"}"), "0");
}

// Rank 0 tells another token than all ranks went on with: a client would read a text that its own
// continuation does not belong to.
TEST_F(HoleTest, ATokenThatTheRanksDidNotGoOnWithIsNotTold) {
  FakeWorkerOptions lying = SlowWorker(0);
  auto steps = std::make_shared<std::atomic<int>>(0);
  lying.spoil = [steps](StepDone* done) {
    if (++*steps == 20 && !done->sampled.empty()) {
      done->sampled[0].token = FakeTokenizer::IdOfByte('!');
    }
  };
  StartTwo(lying, SlowWorker(1));
  SubmitStreams();
  ExpectStreamsAsWithoutFaults();  // no '!'
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"divergence\"}"), "1");
}

// All of it agrees, and yet is no token of the model.
TEST_F(HoleTest, ATokenThatIsNoneIsNotTold) {
  FakeWorkerOptions astray = SlowWorker();
  auto steps = std::make_shared<std::atomic<int>>(0);
  astray.spoil = [steps](StepDone* done) {
    if (++*steps != 20) return;
    std::vector<int32_t> ids;
    for (SampledToken& sampled : done->sampled) ids.push_back(sampled.token = 5000);
    done->sampled_digest = SampledDigest(ids);
  };
  StartServing(astray);
  SubmitStreams();
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"divergence\"}"), "1");
}

}  // namespace
}  // namespace wintserve
