#include "launcher/supervisor_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <random>
#include <thread>

#include "common/captured_log_test_util.h"
#include "common/unix_socket.h"
#include "launcher/client/supervisor_client.h"
#include "proto/supervisor.pb.h"

namespace wintserve {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kTimeoutMs = 10'000;
const char* const kToken = "0123456789abcdef0123456789abcdef";

// Runs the server's poll loop in a thread, as the launcher does in its main one.
class SupervisorServerTest : public ::testing::Test {
 protected:
  SupervisorServerTest() {
    path_ = ::testing::TempDir() + "supervisor_server_test." + std::to_string(::getpid());
    ::unlink(path_.c_str());
    auto server = SupervisorServer::Listen(path_, kToken);
    EXPECT_TRUE(server.ok()) << server.status();
    loop_ = std::thread([this, server = *std::move(server)]() mutable {
      while (!done_) {
        std::vector<pollfd> fds;
        server.AddPollFds(&fds);
        const int timeout_ms = num_exits_to_send_ > 0 ? 0 : 10;
        ++num_rounds_;
        if (::poll(fds.data(), fds.size(), timeout_ms) > 0) server.Serve(fds);
        if (server.TakeRestartRequest()) ++num_restarts_;
        for (const auto& request : server.TakeEndRequests()) ends_.push_back(request);
        for (const auto& report : server.TakeLoadReports()) loads_.push_back(report);
        if (num_exits_to_send_ > 0) {
          --num_exits_to_send_;
          server.SendWorkerExit(WorkerExitOf(num_exits_sent_));
          ++num_exits_sent_;
        }
      }
    });
  }
  ~SupervisorServerTest() override {
    Stop();
    ::unlink(path_.c_str());
  }

  void Stop() {
    done_ = true;
    if (loop_.joinable()) loop_.join();
  }

  UniqueFd Connect() {
    auto fd = ConnectUnix(path_, kTimeoutMs);
    EXPECT_TRUE(fd.ok()) << fd.status();
    return fd.ok() ? *std::move(fd) : UniqueFd();
  }

  static std::string GroupMemoryRequest(uint64_t epoch, uint64_t size_bytes,
                                        const std::string& token = kToken) {
    proto::SupervisorRequest request;
    request.set_token(token);
    request.mutable_group_memory()->set_group_epoch(epoch);
    request.mutable_group_memory()->set_size_bytes(size_bytes);
    return request.SerializeAsString();
  }

  // The memory, or the error that the server replied.
  static absl::StatusOr<MappedMemory> Ask(const UniqueFd& fd, uint64_t epoch, uint64_t size_bytes) {
    EXPECT_TRUE(SendPacket(fd.get(), GroupMemoryRequest(epoch, size_bytes)).ok());
    auto packet = ReceivePacket(fd.get(), kTimeoutMs);
    if (!packet.ok()) return packet.status();
    proto::SupervisorReply reply;
    EXPECT_TRUE(reply.ParseFromString(packet->bytes));
    EXPECT_EQ(reply.status_code() == 0, packet->fd.valid());
    if (reply.status_code() != 0) {
      return absl::Status(static_cast<absl::StatusCode>(reply.status_code()), reply.text());
    }
    return MappedMemory::FromFd(std::move(packet->fd), static_cast<int64_t>(size_bytes));
  }

  static proto::WorkerExit WorkerExitOf(int number) {
    proto::WorkerExit worker_exit;
    worker_exit.set_rank(1);
    worker_exit.set_worker_id(0xfedcba9876543210 + number);
    worker_exit.set_signal(9);
    worker_exit.set_kv_trusted(true);
    return worker_exit;
  }
  // Waits until the server has sent them.
  void SendWorkerExits(int count) {
    const int before = num_exits_sent_;
    num_exits_to_send_ = count;
    for (int i = 0; i < 1000 && num_exits_sent_ < before + count; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    ASSERT_EQ(num_exits_sent_, before + count);
  }

  // A connection that has been answered that it watches.
  UniqueFd Watch() {
    UniqueFd fd = Connect();
    proto::SupervisorRequest request;
    request.set_token(kToken);
    request.mutable_watch_workers();
    EXPECT_TRUE(SendPacket(fd.get(), request.SerializeAsString()).ok());
    const auto packet = ReceivePacket(fd.get(), kTimeoutMs);
    proto::SupervisorReply reply;
    EXPECT_TRUE(packet.ok() && reply.ParseFromString(packet->bytes)) << packet.status();
    EXPECT_EQ(reply.status_code(), 0u) << reply.text();
    return fd;
  }

  static std::string NextExit(const UniqueFd& watcher, int64_t timeout_ms = kTimeoutMs) {
    const auto packet = ReceivePacket(watcher.get(), timeout_ms);
    if (!packet.ok()) return packet.status().ToString();
    proto::WorkerExit worker_exit;
    EXPECT_TRUE(worker_exit.ParseFromString(packet->bytes));
    return worker_exit.ShortDebugString();
  }

  std::string path_;

  std::atomic<int> num_rounds_ = 0;
  std::atomic<int> num_restarts_ = 0;
  std::atomic<int> num_exits_to_send_ = 0;
  std::atomic<int> num_exits_sent_ = 0;
  std::vector<SupervisorServer::EndRequest> ends_;   // read it after Stop
  std::vector<SupervisorServer::LoadReport> loads_;  // this, too

 private:
  std::atomic<bool> done_ = false;
  std::thread loop_;
};

TEST_F(SupervisorServerTest, EveryRankOfAnEpochGetsTheSameMemory) {
  const UniqueFd rank0 = Connect();
  const UniqueFd rank1 = Connect();
  const auto memory0 = Ask(rank0, 7, 4096);
  const auto memory1 = Ask(rank1, 7, 4096);
  ASSERT_TRUE(memory0.ok() && memory1.ok()) << memory0.status() << memory1.status();
  static_cast<char*>(memory0->data())[100] = 'x';
  EXPECT_EQ(static_cast<char*>(memory1->data())[100], 'x');
}

TEST_F(SupervisorServerTest, ANewEpochHasFreshMemoryAndEndsTheOld) {
  const UniqueFd fd = Connect();
  const auto old = Ask(fd, 7, 4096);
  ASSERT_TRUE(old.ok()) << old.status();
  static_cast<char*>(old->data())[0] = 'x';
  const auto fresh = Ask(fd, 8, 8192);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  EXPECT_EQ(static_cast<char*>(fresh->data())[0], 0);
  EXPECT_EQ(static_cast<char*>(old->data())[0], 'x') << "a rank keeps what it has mapped";
  const auto late = Ask(fd, 7, 4096);
  EXPECT_EQ(late.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(late.status().ToString(), HasSubstr("epoch 0x7 has ended"));
}

TEST_F(SupervisorServerTest, RefusesSizesThatCannotBe) {
  const UniqueFd fd = Connect();
  ASSERT_TRUE(Ask(fd, 7, 4096).ok());
  EXPECT_THAT(Ask(fd, 7, 8192).status().ToString(), HasSubstr("asked for 4096 (got 8192)"));
  EXPECT_EQ(Ask(fd, 9, 0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Ask(fd, 9, uint64_t{1} << 62).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(Ask(fd, 7, 4096).ok()) << "a refused request ended the epoch";
}

TEST_F(SupervisorServerTest, AnswersARequestThatItDoesNotKnow) {
  const UniqueFd fd = Connect();
  proto::SupervisorRequest request;
  request.set_token(kToken);
  ASSERT_TRUE(SendPacket(fd.get(), request.SerializeAsString()).ok());
  const auto packet = ReceivePacket(fd.get(), kTimeoutMs);
  ASSERT_TRUE(packet.ok()) << packet.status();
  proto::SupervisorReply reply;
  ASSERT_TRUE(reply.ParseFromString(packet->bytes));
  EXPECT_EQ(reply.status_code(), static_cast<uint32_t>(absl::StatusCode::kInvalidArgument));
}

TEST_F(SupervisorServerTest, PassesOnThatTheCacheManagerHangs) {
  EXPECT_TRUE(RequestCacheManagerRestart(path_, kToken, kTimeoutMs).ok());
  for (int i = 0; i < 500 && num_restarts_ == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_EQ(num_restarts_, 1);
  const absl::Status refused = RequestCacheManagerRestart(path_, "wrong", kTimeoutMs);
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(refused.ToString(), HasSubstr("no launcher at " + path_));
  EXPECT_EQ(RequestCacheManagerRestart(path_ + ".none", kToken, 20).code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(num_restarts_, 1);
}

TEST_F(SupervisorServerTest, TellsEveryWatcherOfEveryExitInOrderFromThenOn) {
  SendWorkerExits(1);  // of the past
  const UniqueFd first = Watch();
  const UniqueFd second = Watch();
  const UniqueFd no_watcher = Connect();
  ASSERT_TRUE(Ask(no_watcher, 7, 4096).ok());
  SendWorkerExits(2);
  for (const UniqueFd* watcher : {&first, &second}) {
    EXPECT_EQ(NextExit(*watcher), WorkerExitOf(1).ShortDebugString());
    EXPECT_EQ(NextExit(*watcher), WorkerExitOf(2).ShortDebugString());
    EXPECT_THAT(NextExit(*watcher, 50), HasSubstr("no packet within"));
  }
  EXPECT_TRUE(Ask(first, 7, 4096).ok()) << "a watcher may ask, too";
  EXPECT_THAT(NextExit(no_watcher, 50), HasSubstr("no packet within"));
}

TEST_F(SupervisorServerTest, AWatcherThatIsDeadOrDoesNotReadStopsNobody) {
  const UniqueFd good = Watch();
  const UniqueFd deaf = Watch();
  Watch();  // and goes at once
  // All together far more than a socket holds, at once less.
  constexpr int kMany = 2000;
  constexpr int kAtOnce = 50;
  for (int i = 0; i < kMany; ++i) {
    if (i % kAtOnce == 0) SendWorkerExits(kAtOnce);
    ASSERT_EQ(NextExit(good), WorkerExitOf(i).ShortDebugString());
  }
  int num_read = 0;
  while (NextExit(deaf).starts_with("rank")) ++num_read;
  EXPECT_GT(num_read, 0);
  EXPECT_LT(num_read, kMany) << "it was not dropped";
}

TEST_F(SupervisorServerTest, PassesOnWhichWorkerHasToGo) {
  for (const uint32_t rank : {1u, 0xffffffffu}) {
    const UniqueFd fd = Connect();
    proto::SupervisorRequest request;
    request.set_token(kToken);
    request.mutable_end_worker()->set_rank(rank);
    request.mutable_end_worker()->set_worker_id(0xfedcba9876543210);
    request.mutable_end_worker()->set_at_fault(rank == 1);
    ASSERT_TRUE(SendPacket(fd.get(), request.SerializeAsString()).ok());
    EXPECT_TRUE(ReceivePacket(fd.get(), kTimeoutMs).ok());
  }
  Stop();
  ASSERT_EQ(ends_.size(), 2u);
  EXPECT_EQ(ends_[0].rank, 1);
  EXPECT_TRUE(ends_[0].at_fault);
  EXPECT_FALSE(ends_[1].at_fault);
  EXPECT_EQ(ends_[1].rank, 0xffffffff);
  EXPECT_EQ(ends_[1].worker_id, 0xfedcba9876543210);
}

TEST_F(SupervisorServerTest, PassesOnHowFarLoadingIs) {
  constexpr int64_t kMost = SupervisorServer::kMaxLoadBytes;
  for (const int64_t done : {int64_t{0}, kMost / 3, kMost}) {
    const LoadProgressNotice notice = {
        .rank = 0xffffffff, .worker_id = 7, .done_bytes = done, .total_bytes = kMost};
    EXPECT_TRUE(TellLoadProgress(path_, kToken, notice, kTimeoutMs).ok());
  }
  Stop();
  ASSERT_EQ(loads_.size(), 3u);
  EXPECT_EQ(loads_[1].rank, 0xffffffff);
  EXPECT_EQ(loads_[1].worker_id, 7u);
  EXPECT_EQ(loads_[1].done_bytes, kMost / 3);
  EXPECT_EQ(loads_[1].total_bytes, kMost);
  EXPECT_EQ(loads_[2].done_bytes, kMost);
}

TEST_F(SupervisorServerTest, RefusesLoadingThatCannotBe) {
  struct Case {
    int64_t done_bytes;
    int64_t total_bytes;
    std::string expected;
  };
  const Case cases[] = {
      {0, 0, "total_bytes: must be 1..1125899906842624 (got 0)"},
      {0, SupervisorServer::kMaxLoadBytes + 1,
       "total_bytes: must be 1..1125899906842624 (got 1125899906842625)"},
      {0, -1, "(got 18446744073709551615)"},
      {8, 7, "done_bytes: must be 0..7, total_bytes (got 8)"},
      {-1, 7, "done_bytes: must be 0..7, total_bytes (got 18446744073709551615)"},
  };
  for (const Case& c : cases) {
    const absl::Status status = TellLoadProgress(
        path_, kToken, {.done_bytes = c.done_bytes, .total_bytes = c.total_bytes}, kTimeoutMs);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.expected));
  }
  EXPECT_EQ(
      TellLoadProgress(path_, "wrong", {.done_bytes = 1, .total_bytes = 2}, kTimeoutMs).code(),
      absl::StatusCode::kUnavailable);
  Stop();
  EXPECT_TRUE(loads_.empty());
}

TEST_F(SupervisorServerTest, DropsHostilePeersAndGoesOnServing) {
  const std::string packets[] = {
      "\xff\xff\xff\xff",
      std::string(kMaxPacketBytes, 'x'),
      "",
      GroupMemoryRequest(7, 4096, ""),
      GroupMemoryRequest(7, 4096, std::string(32, 'x')),
      GroupMemoryRequest(7, 4096, std::string(kToken) + "0"),
  };
  for (const std::string& bytes : packets) {
    const UniqueFd hostile = Connect();
    ASSERT_TRUE(SendPacket(hostile.get(), bytes, STDERR_FILENO).ok());
    EXPECT_FALSE(ReceivePacket(hostile.get(), kTimeoutMs).ok());
  }
  EXPECT_TRUE(Ask(Connect(), 7, 4096).ok());
}

TEST_F(SupervisorServerTest, APeerThatDoesNotReadStopsNobody) {
  const UniqueFd deaf = Connect();
  // Far more replies than a socket holds; sending may fail once the server has dropped the peer.
  for (int i = 0; i < 5000; ++i) {
    if (!SendPacket(deaf.get(), GroupMemoryRequest(7, 4096)).ok()) break;
  }
  EXPECT_TRUE(Ask(Connect(), 7, 4096).ok());
}

TEST_F(SupervisorServerTest, PeersThatSayNothingMakeRoom) {
  const UniqueFd known = Connect();
  ASSERT_TRUE(Ask(known, 7, 4096).ok());
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 300; ++i) silent.push_back(Connect());
  EXPECT_TRUE(Ask(Connect(), 7, 4096).ok());
  EXPECT_TRUE(Ask(known, 7, 4096).ok()) << "one that has shown the token stays";
}

// Of descriptors of the test's own process, which is the server's, too.
class OneDescriptorLeft {
 public:
  OneDescriptorLeft() {
    ::getrlimit(RLIMIT_NOFILE, &before_);
    const UniqueFd lowest(::dup(STDERR_FILENO));
    SetLimit(lowest.get() + 1);
  }
  ~OneDescriptorLeft() { SetLimit(before_.rlim_cur); }
  OneDescriptorLeft(const OneDescriptorLeft&) = delete;
  OneDescriptorLeft& operator=(const OneDescriptorLeft&) = delete;

 private:
  void SetLimit(rlim_t limit) const {
    const rlimit lowered = {limit, before_.rlim_max};
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &lowered), 0);
  }
  rlimit before_ = {};
};

TEST_F(SupervisorServerTest, WithoutDescriptorsItWaitsServesWhomItHasAndRecovers) {
  CapturedLog log;
  const UniqueFd known = Connect();
  ASSERT_TRUE(Ask(known, 7, 4096).ok());
  UniqueFd waiting;
  {
    const OneDescriptorLeft limit;
    waiting = Connect();  // has the last one
    const int before = num_rounds_;
    const auto begin = std::chrono::steady_clock::now();
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    const int num_rounds = num_rounds_ - before;
    const auto took =
        std::chrono::ceil<std::chrono::milliseconds>(std::chrono::steady_clock::now() - begin);
    // One every 10 ms without news, and one for each try.
    EXPECT_LT(num_rounds, took.count() / 10 + took / SupervisorServer::kAcceptPause + 10);
    proto::SupervisorRequest request;
    request.set_token(kToken);
    request.mutable_restart_cache_manager();
    ASSERT_TRUE(SendPacket(known.get(), request.SerializeAsString()).ok());
    EXPECT_TRUE(ReceivePacket(known.get(), kTimeoutMs).ok());
  }
  EXPECT_TRUE(Ask(waiting, 7, 4096).ok());
  Stop();
  EXPECT_EQ(log.text(),
            "supervisor.sock: cannot accept a connection: accept: Too many open files; trying "
            "again every 100 ms\nsupervisor.sock: accepts connections again\n");
}

TEST_F(SupervisorServerTest, RandomPacketsOfAnySizeEndTheirConnectionAndNothingElse) {
  std::mt19937 random(1);
  for (int i = 0; i < 300; ++i) {
    std::string bytes = i % 2 == 0 ? std::string(random() % kMaxPacketBytes, '\0')
                                   : GroupMemoryRequest(random(), random());
    const size_t num_changes = i % 2 == 0 ? bytes.size() : 1 + random() % 4;
    for (size_t n = 0; n < num_changes; ++n) {
      bytes[i % 2 == 0 ? n : random() % bytes.size()] = static_cast<char>(random());
    }
    const UniqueFd hostile = Connect();
    ASSERT_TRUE(SendPacket(hostile.get(), bytes, i % 3 == 0 ? STDERR_FILENO : -1).ok());
    (void)ReceivePacket(hostile.get(), kTimeoutMs);  // a changed request may still be one
  }
  const auto memory = Ask(Connect(), 1u << 31, 4096);
  EXPECT_TRUE(memory.ok()) << memory.status();
}

TEST_F(SupervisorServerTest, AFloodOfStrangersIsAFewLinesInTheLog) {
  CapturedLog log;
  for (int i = 0; i < 100; ++i) {
    const UniqueFd peer = Connect();
    ASSERT_TRUE(SendPacket(peer.get(), "malformed").ok());
    EXPECT_FALSE(ReceivePacket(peer.get(), kTimeoutMs).ok());
  }
  Stop();
  EXPECT_EQ(log.num_lines(), LogLimit::kMaxLinesPerMinute) << log.text();
}

}  // namespace
}  // namespace wintserve
