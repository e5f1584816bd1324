// Both ends of the cache manager's session: CacheServer and CacheClient.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>

#include "cache_manager/client/pool_memory_client.h"
#include "cache_manager/client/session_test_util.h"
#include "proto/cache.grpc.pb.h"

namespace wintserve {
namespace {

using std::chrono::seconds;
using std::chrono::steady_clock;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

using Session = SessionTest;

int CountOpenFds() {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

TEST_F(Session, OpensAPoolWhoseMemoryTheWorkersCanFetch) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(SmallPool());
  const auto opened = recorder.Opened();
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->num_blocks, 4u);
  EXPECT_NE(opened->pool_epoch, 0u);
  const auto memory = FetchPoolMemory(opened->memory_socket, kToken, opened->pool_epoch, 1,
                                      PoolTier::kDevice, kTimeoutMs);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->size_bytes, 4 * 4096);
}

TEST_F(Session, LeasesWhatIsThereAndReturnsAtTheNextGeneration) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(SmallPool());
  client->LeaseBlocks(/*tag=*/1, 3);
  client->LeaseBlocks(/*tag=*/2, 2);
  const std::vector<PoolBlock> first = recorder.Leased(1);
  ASSERT_THAT(first, SizeIs(3));
  EXPECT_THAT(recorder.Leased(2), SizeIs(1));
  EXPECT_EQ(recorder.available(), 0u);
  client->ReturnBlocks({first[1]});
  client->LeaseBlocks(/*tag=*/3, 2);
  EXPECT_THAT(recorder.Leased(3), ElementsAre(PoolBlock{first[1].id, first[1].generation + 1}));
  // A stale return is refused as a whole: block 0 stays leased, so the pool stays exhausted.
  client->ReturnBlocks({first[0], first[1]});
  client->LeaseBlocks(/*tag=*/4, 1);
  EXPECT_THAT(recorder.Leased(4), IsEmpty());
}

TEST_F(Session, CommitsMatchesReleasesWritesBackAndRestores) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(TieredPool());
  const auto opened = recorder.Opened();
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->num_host_slots, 4u);
  EXPECT_TRUE(FetchPoolMemory(opened->memory_socket, kToken, opened->pool_epoch, 1, PoolTier::kHost,
                              kTimeoutMs)
                  .ok());
  client->LeaseBlocks(1, 4);
  client->Commit(2, CommitOf(recorder.Leased(1)));
  const auto committed = recorder.Committed(2);
  ASSERT_THAT(committed, SizeIs(4));
  client->Match(3, "", kPrompt, false);
  EXPECT_THAT(recorder.Matched(3).device, SizeIs(4));
  client->Release(EntriesOf(committed));
  client->Release(EntriesOf(committed));
  for (int i = 0; i < 4; ++i) {  // one after the other, as the pool is small
    const std::vector<CopyOrder> copies = recorder.CopyOut();
    ASSERT_THAT(copies, SizeIs(1));
    EXPECT_EQ(copies[0].direction, CopyDirection::kToHost);
    client->CopyDone({copies[0].copy_id}, /*step=*/9);
  }
  client->LeaseBlocks(4, 2);  // evicts two from the device
  ASSERT_THAT(recorder.Leased(4), SizeIs(2));
  client->Peek(5, "", kPrompt);
  EXPECT_EQ(recorder.Peeked(5).device_blocks, 2u);
  EXPECT_EQ(recorder.Peeked(5).host_blocks, 2u);
  client->ReturnBlocks(recorder.Leased(4));
  client->Match(6, "", kPrompt, true);
  const MatchResult restored = recorder.Matched(6);
  EXPECT_THAT(restored.device, SizeIs(2));
  ASSERT_THAT(restored.restoring, SizeIs(2));
  ASSERT_THAT(restored.copies, SizeIs(2));
  EXPECT_EQ(restored.copies[0].direction, CopyDirection::kToDevice);
  EXPECT_EQ(restored.copies[0].block, restored.restoring[0].block);
}

TEST_F(Session, AnswersRefusedRequestsAsEmpty) {
  Recorder recorder;
  const auto client = Connect(&recorder);  // and no OpenPool
  client->Peek(1, "", kPrompt);
  client->Match(2, "", kPrompt, true);
  client->LeaseBlocks(3, 1);
  client->Commit(4, CommitOf({{0, 0}, {1, 0}}));
  EXPECT_EQ(recorder.Peeked(1).device_blocks, 0u);
  EXPECT_THAT(recorder.Matched(2).device, IsEmpty());
  EXPECT_THAT(recorder.Leased(3), IsEmpty());
  EXPECT_THAT(EntriesOf(recorder.Committed(4)), ElementsAre(0, 0));
}

// The stream breaks, the pool waits, the client says what it holds.
TEST_F(Session, IsTakenUpAgainByTheSameApiEpoch) {
  Recorder before;
  auto client = Connect(&before);
  client->OpenPool(SmallPool());
  const auto opened = before.Opened();
  ASSERT_TRUE(opened.ok()) << opened.status();
  client->LeaseBlocks(1, 2);
  client->Commit(2, CommitOf(before.Leased(1)));
  const auto entries = EntriesOf(before.Committed(2));
  client->LeaseBlocks(3, 2);
  const std::vector<PoolBlock> leased = before.Leased(3);
  server_.reset();  // breaks every stream
  ASSERT_EQ(before.Closed().code(), absl::StatusCode::kUnavailable);
  StartServer();

  Recorder after;
  client = Connect(&after);
  client->OpenPool(SmallPool());
  const auto resumed = after.Opened();
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_TRUE(resumed->resumed);
  EXPECT_EQ(resumed->pool_epoch, opened->pool_epoch);
  client->LeaseBlocks(4, 1);
  EXPECT_THAT(after.Leased(4), IsEmpty()) << "before Reconcile";
  client->Reconcile({{entries[0], 1}}, {leased[0]}, /*last_copy_id=*/0);
  client->Match(5, "", kPrompt, false);
  EXPECT_THAT(after.Matched(5).device, SizeIs(2));
  client->LeaseBlocks(6, 4);
  EXPECT_THAT(after.Leased(6), SizeIs(1)) << "the lease that was not claimed";
}

TEST_F(Session, EndsWhenItsReconcileIsRefused) {
  Recorder before;
  auto client = Connect(&before);
  client->OpenPool(SmallPool());
  ASSERT_TRUE(before.Opened().ok());
  Recorder after;
  const auto second = Connect(&after);  // takes over
  second->OpenPool(SmallPool());
  ASSERT_TRUE(after.Opened().ok());
  second->Reconcile({{12345, 1}}, {}, 0);
  EXPECT_THAT(std::string(after.Closed().message()), HasSubstr("entry 12345"));
}

TEST_F(Session, BrokenAndNotTakenUpIsOverAfterFiveSecondsAndLeavesThePool) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(SmallPool());
  const auto opened = recorder.Opened();
  ASSERT_TRUE(opened.ok()) << opened.status();
  client->LeaseBlocks(1, 3);
  ASSERT_THAT(recorder.Leased(1), SizeIs(3));
  server_.reset();
  StartServer();
  const auto start = steady_clock::now();
  while (owner_->Stats().num_leased() > 0 && steady_clock::now() - start < seconds(10)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_EQ(owner_->Stats().num_quarantined(), 3u);
  EXPECT_GE(steady_clock::now() - start, seconds(4));
  EXPECT_TRUE(FetchPoolMemory(opened->memory_socket, kToken, opened->pool_epoch, 0,
                              PoolTier::kDevice, kTimeoutMs)
                  .ok());
}

// The API server died; the next one finds the pool, and the prefix cache in it.
TEST_F(Session, AnotherApiServerAdoptsThePoolOfOneThatIsGone) {
  Recorder before;
  auto client = Connect(&before);
  client->OpenPool(TieredPool());
  const auto opened = before.Opened();
  ASSERT_TRUE(opened.ok()) << opened.status();
  client->LeaseBlocks(1, 2);
  CommitRequest commit = CommitOf(before.Leased(1));
  commit.step = 7;
  client->Commit(2, commit);
  ASSERT_THAT(EntriesOf(before.Committed(2)), ElementsAre(1, 2));
  client->LeaseBlocks(3, 2);
  ASSERT_THAT(before.Leased(3), SizeIs(2));

  Recorder after;
  const auto adopter = Connect(&after, /*api_epoch=*/0xdef);
  PoolSpec spec = TieredPool();
  spec.num_blocks = 0;
  spec.resume_only = true;
  spec.adopt_pool_epoch = opened->pool_epoch;
  adopter->OpenPool(spec);
  EXPECT_EQ(after.Opened().status().code(), absl::StatusCode::kFailedPrecondition)
      << "its session is there";
  server_.reset();  // breaks the stream of the first one, and the adopter's
  StartServer();
  Recorder again;
  const auto second = Connect(&again, /*api_epoch=*/0xdef);
  second->OpenPool(spec);
  const auto adopted = again.Opened();
  ASSERT_TRUE(adopted.ok()) << adopted.status();
  EXPECT_EQ(adopted->pool_epoch, opened->pool_epoch);
  EXPECT_EQ(adopted->num_blocks, 4u);
  EXPECT_EQ(adopted->num_host_slots, 4u);
  EXPECT_FALSE(adopted->resumed);
  EXPECT_EQ(adopted->newest_step, 7u);
  second->Match(5, "", kPrompt, false);
  EXPECT_THAT(again.Matched(5).device, SizeIs(2));
  second->LeaseBlocks(6, 4);
  EXPECT_THAT(again.Leased(6), IsEmpty()) << "quarantined";
  second->Fence();
  second->LeaseBlocks(7, 4);
  EXPECT_THAT(again.Leased(7), SizeIs(2));

  second->DistrustSteps(8);
  second->Peek(8, "", kPrompt);
  EXPECT_EQ(again.Peeked(8).device_blocks, 2u) << "of step 7";
  second->DistrustSteps(7);
  second->Peek(9, "", kPrompt);
  EXPECT_EQ(again.Peeked(9).device_blocks, 0u);
}

TEST_F(Session, SecondSessionIsRefusedWithTheNameOfTheFirst) {
  Recorder first_recorder;
  Recorder second_recorder;
  auto first = Connect(&first_recorder);
  const auto second = Connect(&second_recorder, /*api_epoch=*/0xdef);
  first->OpenPool(SmallPool());
  const auto first_pool = first_recorder.Opened();
  ASSERT_TRUE(first_pool.ok()) << first_pool.status();
  second->OpenPool(SmallPool());
  const auto refused = second_recorder.Opened();
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(refused.status().message(),
            "OpenPool: the session of api_epoch 0xabc has the pool open");
  second->LeaseBlocks(/*tag=*/1, 1);
  EXPECT_THAT(second_recorder.Leased(1), IsEmpty());

  // After the end of the first the second may open a pool, in the place of that one.
  first->LeaseBlocks(/*tag=*/1, 4);
  ASSERT_THAT(first_recorder.Leased(1), SizeIs(4));
  first.reset();
  WaitUntilNothingIsLeased();
  second->OpenPool(SmallPool());
  const auto second_pool = second_recorder.Opened();
  ASSERT_TRUE(second_pool.ok()) << second_pool.status();
  EXPECT_NE(second_pool->pool_epoch, first_pool->pool_epoch);
  EXPECT_EQ(FetchPoolMemory(first_pool->memory_socket, kToken, first_pool->pool_epoch, 0,
                            PoolTier::kDevice, kTimeoutMs)
                .status()
                .code(),
            absl::StatusCode::kNotFound);
  second->LeaseBlocks(/*tag=*/2, 4);
  EXPECT_THAT(second_recorder.Leased(2), SizeIs(4));
}

TEST_F(Session, RefusedPoolIsNamedAndLeavesTheSessionUsable) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(Pool(0, {4096}));
  EXPECT_EQ(recorder.Opened().status(),
            absl::InvalidArgumentError("OpenPool: num_blocks is 0; allowed: 1 to 2147483647"));
  client->OpenPool(SmallPool());
  EXPECT_TRUE(recorder.Opened().ok());
}

// The mappings of the pool before may still be closing, so memory is waited for, and the pings
// behind the request are not taken for silence.
TEST_F(Session, PoolThatDoesNotFitIsRefusedAfterTwoSeconds) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  const auto start = steady_clock::now();
  client->OpenPool(Pool(1u << 20, {1u << 30}));
  const auto refused = recorder.Opened();
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("KV pool of 1048576.00 GiB does not fit into the"));
  EXPECT_GE(steady_clock::now() - start, seconds(2));
  client->OpenPool(SmallPool());
  EXPECT_TRUE(recorder.Opened().ok());
}

// The cache manager was killed, and a worker with it: when the next one makes its pool, the kernel
// is still tearing down the dead worker's mapping of the lost pool. That is no end of the instance.
TEST_F(Session, PoolThatFitsOnceADeadWorkersMappingIsGoneIsOpened) {
  server_.reset();
  int num_tries = 0;
  const auto make_memory =
      [&](const PoolSize& size,
          int64_t available_bytes) -> absl::StatusOr<std::unique_ptr<PoolMemory>> {
    if (++num_tries <= 5) return absl::ResourceExhaustedError("out of memory");
    return HostPoolMemory::Create(size, available_bytes);
  };
  owner_ = std::make_unique<PoolOwner>(memory_server_.get(), "", make_memory);
  StartServer();
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(SmallPool());
  const auto opened = recorder.Opened();
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->num_blocks, 4u);
  EXPECT_EQ(num_tries, 6);
}

TEST_F(Session, RefusesASeqOutOfOrder) {
  const auto stub =
      proto::Cache::NewStub(grpc::CreateChannel(target(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  Authorize(&context);
  const auto stream = stub->Session(&context);
  const auto exchange = [&](uint64_t seq) {
    proto::CacheRequest request;
    request.set_seq(seq);
    request.mutable_ping();
    proto::CacheReply reply;
    EXPECT_TRUE(stream->Write(request) && stream->Read(&reply));
    EXPECT_EQ(reply.seq(), seq);
    return reply.refusal().text();
  };
  EXPECT_EQ(exchange(0), "seq is 0; it starts at 1");
  EXPECT_EQ(exchange(1), "");
  EXPECT_EQ(exchange(3), "seq is 3; expected 2");
  EXPECT_EQ(exchange(1), "seq is 1; expected 2");
  EXPECT_EQ(exchange(2), "");
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(Session, ClientIsToldWhenTheServerGoesAway) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(SmallPool());
  ASSERT_TRUE(recorder.Opened().ok());
  server_.reset();
  const absl::Status closed = recorder.Closed();
  EXPECT_EQ(closed.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(closed.message()),
              HasSubstr("the cache manager at " + target() + " ended the session"));
  client->LeaseBlocks(/*tag=*/1, 1);  // without effect
}

TEST_F(Session, CloseCallsNoEventAndEndsTheSessionAfterWhatWasQueued) {
  Recorder recorder;
  auto client = Connect(&recorder);
  client->OpenPool(SmallPool());
  const auto opened = recorder.Opened();
  ASSERT_TRUE(opened.ok()) << opened.status();
  client->LeaseBlocks(/*tag=*/1, 1);
  client->Close();
  client.reset();
  EXPECT_FALSE(recorder.has_closed());
  WaitUntilNothingIsLeased();
  EXPECT_EQ(owner_->Stats().num_quarantined(), 1u);
}

TEST_F(Session, LeaksNoDescriptorInAHundredSessions) {
  const auto cycle = [this] {
    Recorder recorder;
    const auto client = Connect(&recorder);
    client->OpenPool(SmallPool());
    const auto opened = recorder.Opened();
    ASSERT_TRUE(opened.ok()) << opened.status();
    ASSERT_TRUE(FetchPoolMemory(opened->memory_socket, kToken, opened->pool_epoch, 0,
                                PoolTier::kDevice, kTimeoutMs)
                    .ok());
  };
  cycle();
  const int before = CountOpenFds();
  for (int i = 0; i < 100; ++i) cycle();
  // gRPC closes a channel's connection a moment after the channel.
  for (int i = 0; i < 300 && CountOpenFds() > before; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_LE(CountOpenFds(), before);
}

}  // namespace
}  // namespace wintserve
