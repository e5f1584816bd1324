// Both ends of the work queue, talking over a Unix socket of a temporary directory.
#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "api_server/work_queue/client/work_queue_client.h"
#include "api_server/work_queue/plan_codec.h"
#include "api_server/work_queue/server/work_queue_server.h"
#include "common/mutex.h"
#include "common/temp_dir_test_util.h"
#include "common/unique_fd.h"

namespace wintserve {
namespace {

using std::chrono::steady_clock;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr int64_t kTimeoutMs = 10'000;

// Events as lines of text, to be waited for.
class EventLog {
 public:
  void Add(const std::string& line) {
    MutexLock lock(&mutex_);
    lines_.push_back(line);
    changed_.NotifyAll();
  }
  std::vector<std::string> WaitFor(size_t count) {
    MutexLock lock(&mutex_);
    changed_.WaitFor(&mutex_, std::chrono::milliseconds(kTimeoutMs),
                     [&] { return lines_.size() >= count; });
    return lines_;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  std::vector<std::string> lines_;
};

WorkQueueEvents LogTo(EventLog* log) {
  return {
      .on_hello =
          [log](const WorkerHello& hello) { log->Add(fmt::format("hello {}", hello.rank)); },
      .on_ready =
          [log](uint32_t rank, const ReadyMessage& ready) {
            log->Add(fmt::format("ready {} {} {}", rank, ready.group_epoch, ready.pool_epoch));
          },
      .on_step_done =
          [log](uint32_t rank, StepDone done) {
            log->Add(fmt::format("done {} {} {:x}", rank, done.step, done.plan_hash));
          },
      .on_heartbeat =
          [log](uint32_t rank, const HeartbeatMessage& beat) {
            log->Add(fmt::format("beat {} {} {}", rank, beat.resident_bytes, beat.progress));
          },
      .on_pool_detached =
          [log](uint32_t rank, const PoolDetachedMessage& detached) {
            log->Add(fmt::format("detached {} {}", rank, detached.pool_epoch));
          },
      .on_fault =
          [log](uint32_t rank, const FaultMessage& fault) {
            log->Add(fmt::format("fault {} {}{}", rank, fault.text,
                                 fault.kv_trusted ? ", its KV is right" : ""));
          },
      .on_aborted =
          [log](uint32_t rank, const AbortedMessage& aborted) {
            log->Add(fmt::format("aborted {} {}", rank, aborted.group_epoch));
          },
      .on_detached =
          [log](uint32_t rank, uint64_t worker_id, const absl::Status& status) {
            log->Add(fmt::format("gone {} ({}): {}", rank, worker_id, status.ToString()));
          },
      .on_refused = [log](const std::string& reason) { log->Add("refused " + reason); },
  };
}

WorkerHello HelloOfRank(uint32_t rank, uint32_t world_size) {
  return {.worker_id = 100 + rank, .rank = rank, .world_size = world_size, .weights_digest = 0xabc};
}

class WorkQueueTest : public testing::Test {
 protected:
  void StartServer(uint32_t world_size) { StartServer(world_size, LogTo(&log_)); }
  void StartServer(uint32_t world_size, WorkQueueEvents events) {
    auto server = WorkQueueServer::Start(
        {.unix_socket = PathOf("q.sock"), .token = token_, .world_size = world_size},
        std::move(events));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  absl::StatusOr<std::unique_ptr<WorkQueueClient>> Attach(const WorkerHello& hello) {
    return WorkQueueClient::Attach(target(), token_, hello, kTimeoutMs);
  }
  std::string target() const { return "unix:" + PathOf("q.sock"); }

  std::string PathOf(const char* name) const { return (directory_.path() / name).string(); }

  const TempDir directory_;
  const std::string token_ = std::string("\x00\x01\xff binary", 10);
  EventLog log_;
  std::unique_ptr<WorkQueueServer> server_;
};

TEST_F(WorkQueueTest, CarriesTheStartUpAndAStepOfTwoRanks) {
  StartServer(2);
  auto rank0 = Attach(HelloOfRank(0, 2));
  ASSERT_TRUE(rank0.ok()) << rank0.status();
  auto rank1 = Attach(HelloOfRank(1, 2));
  ASSERT_TRUE(rank1.ok()) << rank1.status();
  EXPECT_THAT(log_.WaitFor(2), ElementsAre("hello 0", "hello 1"));

  server_->Send(ConfigureWorker{.group_epoch = 5, .world_size = 2});
  server_->Send(AttachPool{.pool_epoch = 6, .memory_socket = "m", .num_blocks = 7});
  const StepPlan plan{.group_epoch = 5, .step = 1, .rows = {{3, 0, 2, true, {8, 9}}}};
  const uint64_t plan_hash = server_->SendPlan(plan);
  server_->Send(DetachPool{6});
  server_->Send(AbortGroup{5, "rank 1 is gone"});
  server_->Send(ShutdownWorker{});

  for (WorkQueueClient* client : {rank0->get(), rank1->get()}) {
    auto configure = client->Next();
    ASSERT_TRUE(configure.ok()) << configure.status();
    EXPECT_EQ(std::get<ConfigureWorker>(*configure).group_epoch, 5u);
    auto attach = client->Next();
    ASSERT_TRUE(attach.ok()) << attach.status();
    EXPECT_EQ(std::get<AttachPool>(*attach).num_blocks, 7u);
    auto received = client->Next();
    ASSERT_TRUE(received.ok()) << received.status();
    EXPECT_EQ(std::get<ReceivedPlan>(*received).plan_hash, plan_hash);
    EXPECT_THAT(std::get<ReceivedPlan>(*received).plan.rows[0].tokens, ElementsAre(8, 9));
    auto detach = client->Next();
    ASSERT_TRUE(detach.ok()) << detach.status();
    EXPECT_EQ(std::get<DetachPool>(*detach).pool_epoch, 6u);
    auto abort = client->Next();
    ASSERT_TRUE(abort.ok()) << abort.status();
    EXPECT_EQ(std::get<AbortGroup>(*abort).group_epoch, 5u);
    EXPECT_EQ(std::get<AbortGroup>(*abort).reason, "rank 1 is gone");
    auto shutdown = client->Next();
    ASSERT_TRUE(shutdown.ok()) << shutdown.status();
    EXPECT_TRUE(std::holds_alternative<ShutdownWorker>(*shutdown));
  }
  EXPECT_TRUE((*rank0)->SendReady(5, 6).ok());
  EXPECT_TRUE((*rank0)->SendHeartbeat({.resident_bytes = 77, .progress = 5}).ok());
  EXPECT_TRUE((*rank0)->SendStepDone({.step = 1, .plan_hash = 0xf0}).ok());
  EXPECT_TRUE((*rank0)->SendPoolDetached(6).ok());
  EXPECT_TRUE((*rank0)->SendAborted(5).ok());
  EXPECT_TRUE((*rank0)->SendFault(FaultKind::kDevice, "broken", /*kv_trusted=*/false).ok());
  EXPECT_TRUE((*rank0)->SendFault(FaultKind::kInternal, "lost", /*kv_trusted=*/true).ok());
  const std::vector<std::string> lines = log_.WaitFor(9);
  EXPECT_THAT(std::vector(lines.begin() + 2, lines.end()),
              ElementsAre("ready 0 5 6", "beat 0 77 5", "done 0 1 f0", "detached 0 6",
                          "aborted 0 5", "fault 0 broken", "fault 0 lost, its KV is right"));
}

TEST_F(WorkQueueTest, RefusesAWrongTokenWithoutSayingMore) {
  StartServer(1);
  for (const std::string& wrong : {std::string(), std::string("wrong"), std::string(10, 'x')}) {
    auto client = WorkQueueClient::Attach(target(), wrong, HelloOfRank(0, 1), kTimeoutMs);
    EXPECT_EQ(client.status().code(), absl::StatusCode::kUnauthenticated) << client.status();
  }
  EXPECT_TRUE(Attach(HelloOfRank(0, 1)).ok());
  EXPECT_THAT(log_.WaitFor(1)[0], "hello 0");
}

struct BadHello {
  const char* name;
  WorkerHello hello;
  const char* error;
};

class BadHelloTest : public WorkQueueTest, public testing::WithParamInterface<BadHello> {};

TEST_P(BadHelloTest, IsRefusedAndBothSidesLearnWhy) {
  StartServer(2);
  auto first = Attach(HelloOfRank(0, 2));
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_THAT(log_.WaitFor(1), ElementsAre("hello 0"));  // Attach may return before the event
  auto second = Attach(GetParam().hello);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(GetParam().error));
  EXPECT_THAT(log_.WaitFor(2)[1], HasSubstr(GetParam().error));
  // The rank is still free for the right worker.
  EXPECT_TRUE(Attach(HelloOfRank(1, 2)).ok());
}

INSTANTIATE_TEST_SUITE_P(
    All, BadHelloTest,
    testing::Values(
        BadHello{"WorldSize", HelloOfRank(1, 4),
                 "engine worker 1 has world_size 4, the API server expects 2"},
        BadHello{"RankTooLarge", HelloOfRank(2, 2), "rank 2, must be below the world size 2"},
        BadHello{"RankTaken", HelloOfRank(0, 2), "engine worker 0 is attached already"},
        BadHello{"OtherCheckpoint",
                 {.rank = 1, .world_size = 2, .weights_digest = 0xdef},
                 "engine worker 1 has weights_digest 0000000000000def, engine worker 0 has "
                 "0000000000000abc"},
        BadHello{"OtherKvLayout",
                 {.rank = 1, .world_size = 2, .weights_digest = 0xabc, .kv_layout_digest = 1},
                 "engine worker 1 has kv_layout_digest 0000000000000001"}),
    [](const auto& info) { return info.param.name; });

TEST_F(WorkQueueTest, ReportsAWorkerThatLeavesAndLetsItsReplacementIn) {
  StartServer(1);
  auto client = Attach(HelloOfRank(0, 1));
  ASSERT_TRUE(client.ok()) << client.status();
  client->reset();
  const char* const kGone = "gone 0 (100): UNAVAILABLE: the stream ended";
  EXPECT_THAT(log_.WaitFor(2), ElementsAre("hello 0", kGone));
  server_->SendPlan({.step = 1});  // to nobody
  auto replacement = Attach(HelloOfRank(0, 1));
  ASSERT_TRUE(replacement.ok()) << replacement.status();
  EXPECT_THAT(log_.WaitFor(3), ElementsAre("hello 0", kGone, "hello 0"));
  server_->Send(ConfigureWorker{.group_epoch = 6});
  auto configure = (*replacement)->Next();
  ASSERT_TRUE(configure.ok()) << configure.status();
  EXPECT_EQ(std::get<ConfigureWorker>(*configure).group_epoch, 6u);
}

// Nobody calls Next() meanwhile.
TEST_F(WorkQueueTest, AnAbortAndTheEndOfTheStreamInterruptAWorkerThatIsAway) {
  StartServer(1);
  auto client = Attach(HelloOfRank(0, 1));
  ASSERT_TRUE(client.ok()) << client.status();
  EventLog interrupts;
  const auto interrupt = [&](uint64_t epoch) { interrupts.Add(fmt::format("{}", epoch)); };
  (*client)->SetInterrupt(interrupt);
  server_->SendPlan({.step = 1});
  server_->Send(AbortGroup{5, "x"});
  EXPECT_THAT(interrupts.WaitFor(1), ElementsAre("5"));
  server_->Stop(/*grace_ms=*/0);
  EXPECT_THAT(interrupts.WaitFor(2), ElementsAre("5", "0"));
  (*client)->SetInterrupt(nullptr);

  // Whoever asks late hears what has come and was not handed out.
  EXPECT_TRUE(std::holds_alternative<ReceivedPlan>((*client)->Next().value()));
  EventLog late;
  (*client)->SetInterrupt([&](uint64_t epoch) { late.Add(fmt::format("{}", epoch)); });
  EXPECT_THAT(late.WaitFor(2), ElementsAre("5", "0"));
  EXPECT_TRUE(std::holds_alternative<AbortGroup>((*client)->Next().value()));
  EXPECT_EQ((*client)->Next().status().code(), absl::StatusCode::kUnavailable);
  (*client)->SetInterrupt(nullptr);
}

TEST_F(WorkQueueTest, AWorkerLearnsThatTheServerIsGone) {
  StartServer(1);
  auto client = Attach(HelloOfRank(0, 1));
  ASSERT_TRUE(client.ok()) << client.status();
  std::thread stopper([this] { server_->Stop(/*grace_ms=*/0); });
  EXPECT_EQ((*client)->Next().status().code(), absl::StatusCode::kUnavailable);
  stopper.join();
  EXPECT_EQ((*client)->SendReady(0, 0).code(), absl::StatusCode::kUnavailable);
}

TEST_F(WorkQueueTest, CloseWakesNext) {
  StartServer(1);
  auto client = Attach(HelloOfRank(0, 1));
  ASSERT_TRUE(client.ok()) << client.status();
  std::thread closer([&] { (*client)->Close(); });
  EXPECT_EQ((*client)->Next().status().code(), absl::StatusCode::kUnavailable);
  closer.join();
}

TEST_F(WorkQueueTest, AttachSaysThatNobodyListens) {
  auto client = WorkQueueClient::Attach("unix:" + PathOf("none.sock"), token_, HelloOfRank(0, 1),
                                        /*timeout_ms=*/50);
  EXPECT_EQ(client.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(client.status().message()), HasSubstr("no API server at unix:"));
}

TEST_F(WorkQueueTest, StartNamesAnAddressThatCannotBeBound) {
  auto server = WorkQueueServer::Start({.unix_socket = PathOf("missing/q.sock"), .token = token_},
                                       LogTo(&log_));
  EXPECT_EQ(server.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(server.status().message()), HasSubstr("missing/q.sock"));
}

// A port of the loopback address, held as a launcher holds it: bound with SO_REUSEPORT, not
// listening.
class ReservedPort {
 public:
  ReservedPort() : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    const int on = 1;
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    EXPECT_EQ(::bind(fd_.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(::getsockname(fd_.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
    port_ = ntohs(address.sin_port);
  }
  int port() const { return port_; }

 private:
  UniqueFd fd_;
  int port_ = 0;
};

TEST_F(WorkQueueTest, ListensBesideASocketThatReservesItsPort) {
  const ReservedPort reserved;
  const std::string address = fmt::format("127.0.0.1:{}", reserved.port());
  auto server = WorkQueueServer::Start(
      {.unix_socket = PathOf("q.sock"), .tcp_address = address, .token = token_}, LogTo(&log_));
  ASSERT_TRUE(server.ok()) << server.status();
  auto client = WorkQueueClient::Attach(address, token_, HelloOfRank(0, 1), kTimeoutMs);
  EXPECT_TRUE(client.ok()) << client.status();
}

TEST_F(WorkQueueTest, TakesInWhatArrivesWhileItsCallerIsAwayExecuting) {
  StartServer(1);
  auto client = Attach(HelloOfRank(0, 1));
  ASSERT_TRUE(client.ok()) << client.status();
  constexpr uint64_t kPlans = 200;
  StepPlan plan;
  plan.rows.push_back({0, 0, 4096, false, std::vector<int32_t>(4096, 1)});
  for (plan.step = 1; plan.step <= kPlans; ++plan.step) server_->SendPlan(plan);
  // Nobody calls Next(); all of it arrives nevertheless, and outlives the server.
  server_->Send(ShutdownWorker{});
  server_->Stop(/*grace_ms=*/500);
  for (uint64_t step = 1; step <= kPlans; ++step) {
    const auto event = (*client)->Next();
    ASSERT_TRUE(event.ok()) << step << " " << event.status();
    EXPECT_EQ(std::get<ReceivedPlan>(*event).plan.step, step);
  }
  const auto shutdown = (*client)->Next();
  ASSERT_TRUE(shutdown.ok()) << shutdown.status();
  EXPECT_TRUE(std::holds_alternative<ShutdownWorker>(*shutdown));
}

TEST_F(WorkQueueTest, EchoesAThousandPlansInOrder) {
  constexpr int kPlans = 1000;
  Mutex mutex;
  CondVar changed;
  std::vector<uint64_t> steps;
  WorkQueueEvents events = LogTo(&log_);
  events.on_step_done = [&](uint32_t, const StepDone& done) {
    MutexLock lock(&mutex);
    steps.push_back(done.step);
    changed.NotifyAll();
  };
  StartServer(1, std::move(events));
  auto client = Attach(HelloOfRank(0, 1));
  ASSERT_TRUE(client.ok()) << client.status();
  std::thread worker([&] {
    for (;;) {
      absl::StatusOr<ServerEvent> event = (*client)->Next();
      if (!event.ok() || !std::holds_alternative<ReceivedPlan>(*event)) return;
      const ReceivedPlan& received = std::get<ReceivedPlan>(*event);
      (void)(*client)->SendStepDone({.step = received.plan.step, .plan_hash = received.plan_hash});
    }
  });
  StepPlan plan;
  for (uint32_t slot = 0; slot < 8; ++slot) plan.rows.push_back({slot, 100, 1, true, {}});
  std::vector<double> rtt_us;
  for (int i = 1; i <= kPlans; ++i) {
    plan.step = i;
    const auto start = steady_clock::now();
    plan.previous_plan_hash = server_->SendPlan(plan);
    {
      MutexLock lock(&mutex);
      ASSERT_TRUE(changed.WaitFor(&mutex, std::chrono::milliseconds(kTimeoutMs),
                                  [&] { return steps.size() == static_cast<size_t>(i); }));
      ASSERT_EQ(steps.back(), static_cast<uint64_t>(i));
    }
    rtt_us.push_back(
        std::chrono::duration<double, std::micro>(steady_clock::now() - start).count());
  }
  server_->Send(ShutdownWorker{});
  worker.join();
  std::sort(rtt_us.begin(), rtt_us.end());
  fmt::print("plan -> StepDone: p50 {:.0f} us, p99 {:.0f} us\n", rtt_us[kPlans / 2],
             rtt_us[kPlans * 99 / 100]);
}

// The owner of the server acts on events in their order: what it sends before it has seen a Hello
// is not for the stream that came with it.
TEST_F(WorkQueueTest, AStreamIsSentNothingBeforeItIsAccepted) {
  auto server = WorkQueueServer::Start(
      {.unix_socket = PathOf("q.sock"), .token = token_, .world_size = 1, .wait_for_accept = true},
      LogTo(&log_));
  ASSERT_TRUE(server.ok()) << server.status();
  server_ = *std::move(server);
  auto first = Attach(HelloOfRank(0, 1));
  ASSERT_TRUE(first.ok()) << first.status();
  log_.WaitFor(1);
  server_->Accept(0);
  server_->Send(DetachPool{.pool_epoch = 1});
  EXPECT_EQ(std::get<DetachPool>(*(*first)->Next()).pool_epoch, 1u);
  first->reset();
  log_.WaitFor(2);
  auto second = Attach(HelloOfRank(0, 1));
  ASSERT_TRUE(second.ok()) << second.status();
  log_.WaitFor(3);
  server_->Send(DetachPool{.pool_epoch = 2});
  server_->Send(0, AbortGroup{.group_epoch = 3, .reason = "of the first"});
  server_->Cut(0);
  server_->Accept(0);
  server_->Send(0, AbortGroup{.group_epoch = 4, .reason = "of the second"});
  EXPECT_EQ(std::get<AbortGroup>(*(*second)->Next()).group_epoch, 4u);
  server_->Cut(0);
  EXPECT_FALSE((*second)->Next().ok());
  EXPECT_THAT(log_.WaitFor(4).back(), HasSubstr("gone 0 (100)"));
}

}  // namespace
}  // namespace wintserve
