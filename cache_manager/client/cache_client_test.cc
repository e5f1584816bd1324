// The client's end of the session against cache managers that are absent, hang or misbehave.
#include "cache_manager/client/cache_client.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "proto/cache.grpc.pb.h"

namespace wintserve {
namespace {

using std::chrono::seconds;
using std::chrono::steady_clock;
using ::testing::HasSubstr;

constexpr int64_t kTimeoutMs = 10'000;
constexpr uint64_t kApiEpoch = 0xabc;
const char* const kToken = "token of exactly 32 bytes.......";

TEST(CacheClient, IsUnavailableWhenNobodyListens) {
  const auto start = steady_clock::now();
  const auto client = ConnectCacheClient("unix:" + testing::TempDir() + "/nobody.sock", kToken,
                                         kApiEpoch, CacheEvents(), /*timeout_ms=*/100);
  EXPECT_EQ(client.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(client.status().message()), HasSubstr("nobody.sock within 100 ms"));
  EXPECT_LT(steady_clock::now() - start, seconds(5));
}

// Answers the first request and then nothing more, as a process does that hangs above its
// transport.
class HangingService : public proto::Cache::CallbackService {
  class Stream : public grpc::ServerBidiReactor<proto::CacheRequest, proto::CacheReply> {
   public:
    Stream() { StartRead(&request_); }
    void OnReadDone(bool ok) override {
      if (!ok) return Finish(grpc::Status::OK);
      if (reply_.seq() != 0) return StartRead(&request_);
      reply_.set_seq(request_.seq());
      reply_.mutable_done();
      StartWrite(&reply_);
    }
    void OnWriteDone(bool) override { StartRead(&request_); }
    void OnDone() override { delete this; }

   private:
    proto::CacheRequest request_;
    proto::CacheReply reply_;
  };

  grpc::ServerBidiReactor<proto::CacheRequest, proto::CacheReply>* Session(
      grpc::CallbackServerContext*) override {
    return new Stream;
  }
};

// Answers every request twice. A Match restores a block that nothing is copied into.
class EchoingService : public proto::Cache::CallbackService {
  class Stream : public grpc::ServerBidiReactor<proto::CacheRequest, proto::CacheReply> {
   public:
    Stream() { StartRead(&request_); }
    void OnReadDone(bool ok) override {
      if (!ok) return Finish(grpc::Status::OK);
      reply_.Clear();
      reply_.set_seq(request_.seq());
      if (request_.has_match()) reply_.mutable_matched()->add_restoring()->set_entry(7);
      if (request_.has_lease()) reply_.mutable_leased()->add_blocks()->set_id(5);
      StartWrite(&reply_);
    }
    void OnWriteDone(bool) override {
      if (std::exchange(again_, !again_)) return StartWrite(&reply_);
      StartRead(&request_);
    }
    void OnDone() override { delete this; }

   private:
    proto::CacheRequest request_;
    proto::CacheReply reply_;
    bool again_ = true;
  };

  grpc::ServerBidiReactor<proto::CacheRequest, proto::CacheReply>* Session(
      grpc::CallbackServerContext*) override {
    return new Stream;
  }
};

// A10.
TEST(CacheClient, DiscardsRepliesToRequestsThatWereAnsweredBefore) {
  EchoingService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  std::atomic<int> num_leased = 0;
  CacheEvents events;
  events.on_leased = [&](uint64_t, std::vector<PoolBlock>) { ++num_leased; };
  std::promise<absl::Status> closed;
  events.on_closed = [&](absl::Status status) { closed.set_value(status); };
  auto client = ConnectCacheClient("127.0.0.1:" + std::to_string(port), kToken, kApiEpoch, events,
                                   kTimeoutMs);
  ASSERT_TRUE(client.ok()) << client.status();
  for (uint64_t tag = 1; tag <= 10; ++tag) (*client)->LeaseBlocks(tag, 1);
  for (int i = 0; i < 500 && num_leased < 10; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(100));  // the second replies arrive
  EXPECT_EQ(num_leased, 10);
  EXPECT_EQ(closed.get_future().wait_for(seconds(0)), std::future_status::timeout);
  client->reset();
  server->Shutdown();
}

// The scheduler takes every restored block for the target of a copy.
TEST(CacheClient, ClosesASessionWhoseMatchDoesNotAddUp) {
  EchoingService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  std::promise<absl::Status> closed;
  CacheEvents events;
  events.on_matched = [](uint64_t, const MatchResult&) { ADD_FAILURE(); };
  events.on_closed = [&](absl::Status status) { closed.set_value(status); };
  auto client = ConnectCacheClient("127.0.0.1:" + std::to_string(port), kToken, kApiEpoch, events,
                                   kTimeoutMs);
  ASSERT_TRUE(client.ok()) << client.status();
  (*client)->Match(1, "", std::vector<int32_t>{1, 2, 3}, /*allow_restore=*/true);
  auto end = closed.get_future();
  ASSERT_EQ(end.wait_for(seconds(10)), std::future_status::ready);
  EXPECT_EQ(end.get(), absl::InternalError("the cache manager restores 1 blocks by 0 copies"));
  client->reset();
  server->Shutdown();
}

TEST(CacheClient, ClosesASessionThatHasNotRepliedForThreeSeconds) {
  HangingService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  const std::string target = "127.0.0.1:" + std::to_string(port);
  std::promise<absl::Status> closed;
  CacheEvents events;
  events.on_closed = [&](absl::Status status) { closed.set_value(status); };
  const auto start = steady_clock::now();
  auto client = ConnectCacheClient(target, kToken, kApiEpoch, events, kTimeoutMs);
  ASSERT_TRUE(client.ok()) << client.status();
  auto end = closed.get_future();
  ASSERT_EQ(end.wait_for(seconds(10)), std::future_status::ready);
  EXPECT_EQ(end.get(), absl::DeadlineExceededError("the cache manager at " + target +
                                                   " has not replied for 3 s"));
  EXPECT_GE(steady_clock::now() - start, seconds(3));
  client->reset();
  server->Shutdown();
}

}  // namespace
}  // namespace wintserve
