// Both ends of the cache manager's session: CacheServer and CacheClient.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cache_manager/client/cache_client.h"
#include "cache_manager/client/pool_memory_client.h"
#include "cache_manager/memory/memory_server.h"
#include "cache_manager/service/cache_server.h"
#include "cache_manager/service/pool_owner.h"
#include "common/mutex.h"
#include "common/unique_fd.h"
#include "proto/cache.grpc.pb.h"

namespace wintserve {
namespace {

using std::chrono::seconds;
using std::chrono::steady_clock;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr int64_t kTimeoutMs = 10'000;
constexpr uint64_t kApiEpoch = 0xabc;
const std::string kToken = std::string("\0\xff\x80 token of exactly 32 bytes..", 32);

int CountOpenFds() {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

// Records a client's events; waits for them.
class Recorder {
 public:
  CacheEvents Events() {
    return {.on_opened = [this](absl::StatusOr<OpenedPool> opened) { Set(&opened_, opened); },
            .on_leased =
                [this](uint64_t tag, std::vector<PoolBlock> blocks) {
                  MutexLock lock(&mu_);
                  leased_[tag] = std::move(blocks);
                  changed_.NotifyAll();
                },
            .on_closed = [this](absl::Status status) { Set(&closed_, status); }};
  }

  absl::StatusOr<OpenedPool> Opened() {
    return Take(&opened_).value_or(absl::DeadlineExceededError("no on_opened"));
  }
  absl::Status Closed() {
    return Take(&closed_).value_or(absl::DeadlineExceededError("no on_closed"));
  }
  std::vector<PoolBlock> Leased(uint64_t tag) {
    MutexLock lock(&mu_);
    EXPECT_TRUE(changed_.WaitFor(&mu_, seconds(10), [&] { return leased_.contains(tag); }));
    return leased_[tag];
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
  std::optional<T> Take(std::optional<T>* slot) {
    MutexLock lock(&mu_);
    changed_.WaitFor(&mu_, seconds(10), [&] { return slot->has_value(); });
    return std::exchange(*slot, std::nullopt);
  }

  Mutex mu_;
  CondVar changed_;
  std::optional<absl::StatusOr<OpenedPool>> opened_;
  std::optional<absl::Status> closed_;
  std::map<uint64_t, std::vector<PoolBlock>> leased_;
};

class Session : public testing::Test {
 protected:
  void SetUp() override {
    const std::string prefix = testing::TempDir() + "/session_" + std::to_string(::getpid());
    unix_path_ = prefix + "_cache.sock";
    auto memory_server = MemoryServer::Start(prefix + "_memory.sock", kToken);
    ASSERT_TRUE(memory_server.ok()) << memory_server.status();
    memory_server_ = *std::move(memory_server);
    owner_ = std::make_unique<PoolOwner>(memory_server_.get());
    auto server = CacheServer::Start(Options(), owner_.get());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
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

  std::string unix_path_;
  std::unique_ptr<MemoryServer> memory_server_;
  std::unique_ptr<PoolOwner> owner_;
  std::unique_ptr<CacheServer> server_;
};

PoolSpec SmallPool() { return {.num_blocks = 4, .block_bytes_by_rank = {4096, 4096}}; }

TEST_F(Session, OpensAPoolWhoseMemoryTheWorkersCanFetch) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(SmallPool());
  const auto opened = recorder.Opened();
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->num_blocks, 4u);
  EXPECT_NE(opened->pool_epoch, 0u);
  const auto memory =
      FetchPoolMemory(opened->memory_socket, kToken, opened->pool_epoch, 1, kTimeoutMs);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->size_bytes(), 4 * 4096);
}

TEST_F(Session, LeasesAllOrNothingAndReturnsAtTheNextGeneration) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(SmallPool());
  client->LeaseBlocks(/*tag=*/1, 3);
  client->LeaseBlocks(/*tag=*/2, 2);
  const std::vector<PoolBlock> first = recorder.Leased(1);
  EXPECT_THAT(first, ElementsAre(PoolBlock{0, 1}, PoolBlock{1, 1}, PoolBlock{2, 1}));
  EXPECT_THAT(recorder.Leased(2), IsEmpty());

  client->ReturnBlocks({first[1]});
  client->LeaseBlocks(/*tag=*/3, 2);
  EXPECT_THAT(recorder.Leased(3), ElementsAre(PoolBlock{1, 2}, PoolBlock{3, 1}));

  // A stale return is refused as a whole: block 0 stays leased, so the pool stays exhausted.
  client->ReturnBlocks({first[0], first[1]});
  client->LeaseBlocks(/*tag=*/4, 1);
  EXPECT_THAT(recorder.Leased(4), IsEmpty());
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

  // The end of the first returns its leases and ends its epoch; then the second may open.
  first->LeaseBlocks(/*tag=*/1, 4);
  ASSERT_THAT(first_recorder.Leased(1), SizeIs(4));
  first.reset();
  EXPECT_EQ(
      FetchPoolMemory(first_pool->memory_socket, kToken, first_pool->pool_epoch, 0, kTimeoutMs)
          .status()
          .code(),
      absl::StatusCode::kFailedPrecondition);
  second->OpenPool(SmallPool());
  const auto second_pool = second_recorder.Opened();
  ASSERT_TRUE(second_pool.ok()) << second_pool.status();
  EXPECT_NE(second_pool->pool_epoch, first_pool->pool_epoch);
  second->LeaseBlocks(/*tag=*/2, 4);
  EXPECT_THAT(second_recorder.Leased(2), SizeIs(4));
}

struct BadPool {
  const char* name;
  PoolSpec spec;
  absl::StatusCode code;
  const char* text;
};

class RefusedPool : public Session, public testing::WithParamInterface<BadPool> {};

TEST_P(RefusedPool, NamesWhatIsWrongAndLeavesTheSessionUsable) {
  Recorder recorder;
  const auto client = Connect(&recorder);
  client->OpenPool(GetParam().spec);
  const auto refused = recorder.Opened();
  EXPECT_EQ(refused.status().code(), GetParam().code);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr(GetParam().text));
  client->OpenPool(SmallPool());
  EXPECT_TRUE(recorder.Opened().ok());
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusedPool,
    testing::Values(BadPool{"NoBlocks",
                            {0, {4096}, 0},
                            absl::StatusCode::kInvalidArgument,
                            "OpenPool: num_blocks is 0; allowed: 1 to 2147483647"},
                    BadPool{"TooManyBlocks",
                            {1u << 31, {4096}, 0},
                            absl::StatusCode::kInvalidArgument,
                            "OpenPool: num_blocks is 2147483648; allowed: 1 to 2147483647"},
                    BadPool{"NoRanks",
                            {4, {}, 0},
                            absl::StatusCode::kInvalidArgument,
                            "OpenPool: block_bytes_by_rank has 0 entries; allowed: 1 to 4"},
                    BadPool{"TooManyRanks",
                            {4, {1, 1, 1, 1, 1}, 0},
                            absl::StatusCode::kInvalidArgument,
                            "OpenPool: block_bytes_by_rank has 5 entries; allowed: 1 to 4"},
                    BadPool{"EmptyBlocks",
                            {4, {4096, 0}, 0},
                            absl::StatusCode::kInvalidArgument,
                            "OpenPool: block_bytes_by_rank[1] is 0"},
                    BadPool{"MoreThanTheMemory",
                            {1u << 20, {1u << 30}, 0},
                            absl::StatusCode::kResourceExhausted,
                            "KV pool of 1048576.00 GiB does not fit into the"}),
    [](const auto& info) { return info.param.name; });

TEST_F(Session, RefusesRequestsBeforeOpenPoolUnknownKindsAndForeignBlocks) {
  const auto handle = [this](const proto::CacheRequest& request) {
    const proto::CacheReply reply = owner_->Handle(/*session_id=*/1, request);
    EXPECT_EQ(reply.seq(), request.seq());
    return reply.refusal().text();
  };
  proto::CacheRequest request;
  request.set_seq(7);
  EXPECT_EQ(handle(request), "a request of an unknown kind");
  request.mutable_lease()->set_count(1);
  EXPECT_EQ(handle(request), "this session has no pool open; OpenPool comes first");
  request.mutable_return_blocks();
  EXPECT_EQ(handle(request), "this session has no pool open; OpenPool comes first");
  proto::OpenPool* const open = request.mutable_open();
  open->set_num_blocks(4);
  open->add_block_bytes_by_rank(4096);
  EXPECT_EQ(handle(request), "OpenPool: api_epoch is 0");
  request.mutable_open()->set_api_epoch(kApiEpoch);
  EXPECT_EQ(handle(request), "");
  request.mutable_return_blocks()->add_blocks()->set_id(0xffffffff);
  EXPECT_EQ(handle(request), "block 4294967295 is not in the pool, which has 0 to 3");
  request.mutable_lease()->set_count(0);
  EXPECT_EQ(handle(request), "a lease of 0 blocks; at least 1");
  owner_->EndSession(1);
}

TEST_F(Session, WrongTokenIsRefused) {
  Recorder recorder;
  std::string nearly = kToken;
  nearly.back() ^= 1;
  const auto client =
      ConnectCacheClient(target(), nearly, kApiEpoch, recorder.Events(), kTimeoutMs);
  EXPECT_EQ(client.status().code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(std::string(client.status().message()),
              HasSubstr("the cache queue demands the instance token"));
  EXPECT_FALSE(recorder.has_closed());
}

TEST_F(Session, IsReachableOnItsPortToo) {
  Recorder recorder;
  const auto client = ConnectCacheClient("127.0.0.1:" + std::to_string(server_->port()), kToken,
                                         kApiEpoch, recorder.Events(), kTimeoutMs);
  ASSERT_TRUE(client.ok()) << client.status();
  (*client)->OpenPool(SmallPool());
  EXPECT_TRUE(recorder.Opened().ok());
}

TEST_F(Session, ServerNamesTheFlagOfATakenPort) {
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
  EXPECT_FALSE(
      FetchPoolMemory(opened->memory_socket, kToken, opened->pool_epoch, 0, kTimeoutMs).ok());
}

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
      reply_.mutable_pong();
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

TEST(CacheClient, ClosesASessionThatHasNotRepliedForThreeSeconds) {
  HangingService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  const std::string target = "127.0.0.1:" + std::to_string(port);
  Recorder recorder;
  const auto start = steady_clock::now();
  auto client = ConnectCacheClient(target, kToken, kApiEpoch, recorder.Events(), kTimeoutMs);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_EQ(recorder.Closed(),
            absl::UnavailableError("the cache manager at " + target + " has not replied for 3 s"));
  EXPECT_GE(steady_clock::now() - start, seconds(3));
  client->reset();
  server->Shutdown();
}

TEST_F(Session, LeaksNoDescriptorInAHundredSessions) {
  const auto cycle = [this] {
    Recorder recorder;
    const auto client = Connect(&recorder);
    client->OpenPool(SmallPool());
    const auto opened = recorder.Opened();
    ASSERT_TRUE(opened.ok()) << opened.status();
    ASSERT_TRUE(
        FetchPoolMemory(opened->memory_socket, kToken, opened->pool_epoch, 0, kTimeoutMs).ok());
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
