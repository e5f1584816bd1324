// Who gets to the cache manager's server, and what it does beside the session: Stats, Watch, Admin.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <chrono>
#include <optional>
#include <string>
#include <thread>

#include "cache_manager/client/session_test_util.h"
#include "common/captured_log_test_util.h"
#include "common/log_limit.h"
#include "common/unique_fd.h"
#include "proto/cache.grpc.pb.h"

namespace wintserve {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

using CacheAccess = SessionTest;

TEST_F(CacheAccess, FlushesOverAConnectionOfItsOwn) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(SmallPool());
  client->LeaseBlocks(1, 2);
  client->Commit(2, CommitOf(recorder.Leased(1)));
  ASSERT_THAT(recorder.Committed(2), SizeIs(2));
  EXPECT_THAT(FlushPrefixCache(target(), kToken, "another salt", kTimeoutMs),
              testing::Property(&absl::StatusOr<uint64_t>::value, 0u));
  const auto flushed = FlushPrefixCache(target(), kToken, std::nullopt, kTimeoutMs);
  ASSERT_TRUE(flushed.ok()) << flushed.status();
  EXPECT_EQ(*flushed, 2u);
  client->Match(3, "", kPrompt, false);
  EXPECT_THAT(recorder.Matched(3).device, IsEmpty());
  EXPECT_EQ(FlushPrefixCache(target(), "wrong", std::nullopt, kTimeoutMs).status().code(),
            absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(FlushPrefixCache("unix:/nobody.sock", kToken, std::nullopt, 50).status(),
            absl::UnavailableError("no cache manager at unix:/nobody.sock within 50 ms"));
}

TEST_F(CacheAccess, StatsAndWatchDemandTheTokenAndServe) {
  const auto stub =
      proto::Cache::NewStub(grpc::CreateChannel(target(), grpc::InsecureChannelCredentials()));
  proto::StatsReply stats;
  {
    grpc::ClientContext context;
    EXPECT_EQ(stub->Stats(&context, {}, &stats).error_code(), grpc::StatusCode::UNAUTHENTICATED);
    grpc::ClientContext watch_context;
    EXPECT_EQ(stub->Watch(&watch_context, {})->Finish().error_code(),
              grpc::StatusCode::UNAUTHENTICATED);
  }
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(SmallPool());
  const auto opened = recorder.Opened();
  ASSERT_TRUE(opened.ok()) << opened.status();
  grpc::ClientContext watch_context;
  Authorize(&watch_context);
  const auto watch = stub->Watch(&watch_context, {});
  proto::CacheEvent event;
  // Events before the stream is known there are not for it.
  for (uint64_t tag = 1; tag < 100; ++tag) {
    client->LeaseBlocks(tag, 1);
    client->Commit(tag, CommitOf(recorder.Leased(tag)));
    client->Release(EntriesOf(recorder.Committed(tag)));
    ASSERT_TRUE(FlushPrefixCache(target(), kToken, std::nullopt, kTimeoutMs).ok());
    if (tag > 1) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  ASSERT_TRUE(watch->Read(&event));
  EXPECT_EQ(event.pool_epoch(), opened->pool_epoch);
  watch_context.TryCancel();

  grpc::ClientContext context;
  Authorize(&context);
  ASSERT_TRUE(stub->Stats(&context, {}, &stats).ok());
  EXPECT_EQ(stats.pool_epoch(), opened->pool_epoch);
  EXPECT_EQ(stats.committed_blocks(), 99u);
  EXPECT_EQ(stats.num_blocks(), 4u);
}

TEST_F(CacheAccess, WatchEndsForAReaderThatFallsBehind) {
  const auto stub =
      proto::Cache::NewStub(grpc::CreateChannel(target(), grpc::InsecureChannelCredentials()));
  Recorder recorder;
  const auto client = Connect(&recorder);
  PoolSpec spec = Pool(512, {4096});
  spec.block_size_tokens = 1024;  // large events fill the transport's buffers early
  client->OpenPool(spec);
  ASSERT_TRUE(recorder.Opened().ok());
  grpc::ClientContext context;
  Authorize(&context);
  const auto watch = stub->Watch(&context, {});
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  for (uint64_t tag = 1; tag <= 20; ++tag) {
    client->LeaseBlocks(tag, 512);
    CommitRequest request;
    for (const PoolBlock& block : recorder.Leased(tag)) {
      request.blocks.push_back({block, std::vector<int32_t>(1024, 7)});
    }
    client->Commit(tag, std::move(request));
    client->Release(EntriesOf(recorder.Committed(tag)));
    ASSERT_TRUE(FlushPrefixCache(target(), kToken, std::nullopt, kTimeoutMs).ok());
  }
  proto::CacheEvent event;
  while (watch->Read(&event)) {
  }
  const grpc::Status status = watch->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("the reader fell 4096 events behind"));
}

TEST_F(CacheAccess, WrongTokenIsRefused) {
  Recorder recorder;
  std::string nearly = kToken;
  nearly.back() ^= 1;
  const auto client =
      ConnectCacheClient(target(), nearly, kApiEpoch, recorder.Events(), kTimeoutMs);
  EXPECT_EQ(client.status().code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(std::string(client.status().message()),
              HasSubstr("the queue demands the instance token"));
  EXPECT_FALSE(recorder.has_closed());
}

TEST_F(CacheAccess, AFloodOfStrangersIsAFewLinesInTheLog) {
  CapturedLog log;
  const auto stub =
      proto::Cache::NewStub(grpc::CreateChannel(target(), grpc::InsecureChannelCredentials()));
  for (int i = 0; i < 100; ++i) {
    grpc::ClientContext context;
    proto::StatsReply stats;
    EXPECT_EQ(stub->Stats(&context, {}, &stats).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  }
  Recorder recorder;
  auto client = Connect(&recorder);
  client->LeaseBlocks(1, 1);  // before OpenPool: a bug of the API server
  EXPECT_THAT(recorder.Leased(1), IsEmpty());
  client.reset();
  server_.reset();
  EXPECT_EQ(log.num_lines(), LogLimit::kMaxLinesPerMinute + 2) << log.text();
  EXPECT_THAT(log.text(), HasSubstr("refused: this session has no pool open")) << "by the server";
  EXPECT_THAT(log.text(), HasSubstr("the cache manager refused a request")) << "by the client";
}

TEST_F(CacheAccess, IsReachableOnItsPortToo) {
  Recorder recorder;
  const auto client = ConnectCacheClient("127.0.0.1:" + std::to_string(server_->port()), kToken,
                                         kApiEpoch, recorder.Events(), kTimeoutMs);
  ASSERT_TRUE(client.ok()) << client.status();
  (*client)->OpenPool(SmallPool());
  EXPECT_TRUE(recorder.Opened().ok());
}

TEST_F(CacheAccess, ServerNamesTheFlagOfATakenPort) {
  // A listener without SO_REUSEPORT, as any other program's.
  const UniqueFd listener(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  ASSERT_EQ(::bind(listener.get(), generic, length), 0);
  ASSERT_EQ(::listen(listener.get(), 1), 0);
  ASSERT_EQ(::getsockname(listener.get(), generic, &length), 0);

  CacheServerOptions options = Options();
  options.port = ntohs(address.sin_port);
  options.unix_path += "2";
  EXPECT_EQ(CacheServer::Start(options, owner_.get()).status(),
            absl::UnavailableError("cannot listen on 127.0.0.1:" + std::to_string(options.port) +
                                   ", is the port taken? Choose another with --cache-queue-port"));
}

}  // namespace
}  // namespace wintserve
