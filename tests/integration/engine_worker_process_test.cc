// Real engine-worker processes on the demo model, driven through their real sockets. The test
// stands in for the API server, the cache manager and the launcher.
#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "api_server/work_queue/server/work_queue_server.h"
#include "cache_manager/memory/memory_server.h"
#include "cache_manager/memory/pool_memory.h"
#include "common/check.h"
#include "common/config/instance.h"
#include "common/exit_code.h"
#include "common/mutex.h"
#include "common/unix_socket.h"
#include "proto/supervisor.pb.h"

namespace wintserve {
namespace {

using testing::HasSubstr;

constexpr uint64_t kGroupEpoch = 11;
constexpr uint64_t kPoolEpoch = 12;
constexpr uint32_t kNumBlocks = 64;
constexpr int kBlockTokens = 64;
constexpr int32_t kEndOfSequence = 2;
constexpr std::chrono::seconds kPatience(60);

// Hands out one memory a group epoch, as the launcher does.
class Supervisor {
 public:
  explicit Supervisor(const std::string& path) {
    auto listener = ListenUnix(path);
    CHECK(listener.ok(), "{}", listener.status().ToString());
    listener_ = *std::move(listener);
    thread_ = std::thread([this] { Serve(); });
  }
  ~Supervisor() {
    ::shutdown(listener_.get(), SHUT_RDWR);
    thread_.join();
  }

 private:
  void Serve() {
    std::map<uint64_t, MappedMemory> memories;
    while (true) {
      const auto peer = AcceptUnix(listener_.get());
      if (!peer.ok()) return;
      const auto packet = ReceivePacket(peer->get(), 5000);
      proto::SupervisorRequest request;
      if (!packet.ok() || !request.ParseFromString(packet->bytes)) continue;
      const proto::GroupMemory& wanted = request.group_memory();
      if (!memories.contains(wanted.group_epoch())) {
        auto memory = MappedMemory::Create("group", static_cast<int64_t>(wanted.size_bytes()));
        CHECK(memory.ok());
        memories[wanted.group_epoch()] = *std::move(memory);
      }
      proto::SupervisorReply reply;
      reply.set_text("ok");
      CHECK(SendPacket(peer->get(), reply.SerializeAsString(), memories[wanted.group_epoch()].fd())
                .ok());
    }
  }

  UniqueFd listener_;
  std::thread thread_;
};

// What came from the workers. Thread-safe.
class Inbox {
 public:
  WorkQueueEvents Events() {
    return {
        .on_hello = [this](const WorkerHello& hello) { Note([&] { hellos_.push_back(hello); }); },
        .on_ready = [this](uint32_t, const ReadyMessage&) { Note([&] { ++num_ready_; }); },
        .on_step_done =
            [this](uint32_t rank, StepDone done) {
              Note([&] { steps_[done.step][rank] = std::move(done); });
            },
        .on_heartbeat = [](uint32_t, const HeartbeatMessage&) {},
        .on_fault = [this](uint32_t,
                           const FaultMessage& fault) { Note([&] { fault_ = fault.text; }); },
        .on_disconnected = [](uint32_t, const std::string&) {},
        .on_refused = [](const std::string& reason) { CHECK(false, "refused: {}", reason); }};
  }

  std::vector<WorkerHello> WaitForHellos(size_t count) {
    MutexLock lock(&mutex_);
    CHECK(WaitFor([&]() NO_THREAD_SAFETY_ANALYSIS { return hellos_.size() == count; }));
    return hellos_;
  }
  void WaitForReady(int count) {
    MutexLock lock(&mutex_);
    CHECK(WaitFor([&]() NO_THREAD_SAFETY_ANALYSIS { return num_ready_ == count; }));
  }
  // By rank.
  std::map<uint32_t, StepDone> WaitForStep(uint64_t step, size_t num_ranks) {
    MutexLock lock(&mutex_);
    CHECK(WaitFor([&]() NO_THREAD_SAFETY_ANALYSIS { return steps_[step].size() == num_ranks; }),
          "step {}", step);
    return steps_[step];
  }
  std::string WaitForFault() {
    MutexLock lock(&mutex_);
    CHECK(WaitFor([&]() NO_THREAD_SAFETY_ANALYSIS { return !fault_.empty(); }));
    return fault_;
  }

 private:
  template <typename Change>
  void Note(Change change) {
    MutexLock lock(&mutex_);
    change();
    changed_.NotifyAll();
  }
  template <typename Condition>
  bool WaitFor(Condition condition) REQUIRES(mutex_) {
    return changed_.WaitFor(&mutex_, kPatience, condition);
  }

  Mutex mutex_;
  CondVar changed_;
  std::vector<WorkerHello> hellos_ GUARDED_BY(mutex_);
  int num_ready_ GUARDED_BY(mutex_) = 0;
  std::map<uint64_t, std::map<uint32_t, StepDone>> steps_ GUARDED_BY(mutex_);
  std::string fault_ GUARDED_BY(mutex_);
};

class EngineWorkerProcess : public testing::Test {
 protected:
  EngineWorkerProcess() {
    std::string pattern = testing::TempDir() + "/engine_worker.XXXXXX";
    CHECK(::mkdtemp(pattern.data()) != nullptr);
    instance_.runtime_dir = pattern;
    instance_.token = std::string(32, 't');
    instance_.options.model = "models/poet";
  }

  ~EngineWorkerProcess() override {
    for (const pid_t child : children_) {
      ::kill(child, SIGKILL);
      ::waitpid(child, nullptr, 0);
    }
    server_.reset();
    std::filesystem::remove_all(instance_.runtime_dir);
  }

  // Everything that a worker expects to find, and the workers.
  void Start(int world_size) {
    instance_.options.tensor_parallel_size = world_size;
    supervisor_.emplace(instance_.supervisor_socket());
    auto memory_server = MemoryServer::Start(instance_.memory_socket(), instance_.token);
    CHECK(memory_server.ok());
    memory_server_ = *std::move(memory_server);
    auto server = WorkQueueServer::Start({.unix_socket = instance_.work_queue_socket(),
                                          .token = instance_.token,
                                          .world_size = static_cast<uint32_t>(world_size)},
                                         inbox_.Events());
    CHECK(server.ok(), "{}", server.status().ToString());
    server_ = *std::move(server);
    for (int rank = 0; rank < world_size; ++rank) Spawn(rank);
  }

  void Spawn(int rank) {
    instance_.rank = rank;
    auto fd = WriteInstance(instance_);
    CHECK(fd.ok());
    const std::string argument = fmt::format("--instance-fd={}", fd->get());
    const pid_t child = ::fork();
    CHECK(child >= 0);
    if (child == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      const int log = ::open(LogPath(rank).c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
      ::dup2(log, STDERR_FILENO);
      ::execl(ENGINE_WORKER_BINARY, ENGINE_WORKER_BINARY, argument.c_str(), nullptr);
      ::_exit(127);
    }
    children_.push_back(child);
  }

  void MakeReady(int world_size) {
    const std::vector<WorkerHello> hellos = inbox_.WaitForHellos(world_size);
    std::vector<uint64_t> block_bytes(world_size);
    for (const WorkerHello& hello : hellos) block_bytes[hello.rank] = hello.kv_block_bytes;
    auto pool = PoolMemory::Create(kNumBlocks, block_bytes, int64_t{1} << 40);
    CHECK(pool.ok(), "{}", pool.status().ToString());
    memory_server_->Publish(kPoolEpoch, *std::move(pool));
    server_->Send(ConfigureWorker{.group_epoch = kGroupEpoch,
                                  .world_size = static_cast<uint32_t>(world_size),
                                  .max_slots = 16,
                                  .max_tokens = 2048,
                                  .max_sequence_tokens = 2048,
                                  .sampled_vocab_size = hellos[0].vocab_size});
    server_->Send(AttachPool{.pool_epoch = kPoolEpoch,
                             .memory_socket = instance_.memory_socket(),
                             .num_blocks = kNumBlocks});
    inbox_.WaitForReady(world_size);
  }

  // Numbers and chains the plan, and waits until every rank has executed it.
  StepDone Execute(StepPlan plan) {
    plan.group_epoch = kGroupEpoch;
    plan.pool_epoch = kPoolEpoch;
    plan.step = ++step_;
    plan.previous_plan_hash = plan_hash_;
    plan_hash_ = server_->SendPlan(plan);
    const auto done = inbox_.WaitForStep(step_, children_.size());
    for (const auto& [rank, theirs] : done) {
      EXPECT_EQ(theirs.plan_hash, plan_hash_);
      EXPECT_EQ(theirs.sampled_digest, done.at(0).sampled_digest) << "rank " << rank;
    }
    return done.at(0);
  }

  // The exit code of the oldest child, or 128 + the signal that ended it.
  int WaitForExit() {
    const pid_t child = children_.front();
    children_.erase(children_.begin());
    int status = 0;
    CHECK(::waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  std::string LogPath(int rank) const {
    return fmt::format("{}/worker.{}.log", instance_.runtime_dir, rank);
  }
  std::string Log(int rank) const {
    std::ifstream file(LogPath(rank));
    return std::string(std::istreambuf_iterator<char>(file), {});
  }

  Instance instance_;
  Inbox inbox_;
  std::optional<Supervisor> supervisor_;
  std::unique_ptr<MemoryServer> memory_server_;
  std::unique_ptr<WorkQueueServer> server_;
  std::vector<pid_t> children_;
  uint64_t step_ = 0;
  uint64_t plan_hash_ = 0;
};

struct GoldenCase {
  std::vector<int32_t> prompt;
  std::vector<int32_t> greedy;
};

std::vector<GoldenCase> ReadGolden() {
  std::ifstream file("tests/golden/poet-wint2.json");
  const nlohmann::json golden = nlohmann::json::parse(file);
  std::vector<GoldenCase> cases;
  for (const auto& entry : golden.at("cases")) {
    cases.push_back({entry.at("ids").get<std::vector<int32_t>>(),
                     entry.at("greedy").at("ids").get<std::vector<int32_t>>()});
  }
  return cases;
}

class GreedyGolden : public EngineWorkerProcess, public testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, GreedyGolden, testing::Values(1, 2, 4),
                         [](const auto& info) { return fmt::format("{}", info.param); });

TEST_P(GreedyGolden, AllPromptsTogetherGetTheReferencesTokens) {
  const std::vector<GoldenCase> cases = ReadGolden();
  ASSERT_GE(cases.size(), 2u);
  Start(GetParam());
  MakeReady(GetParam());
  constexpr uint32_t kBlocksEach = 4;
  ASSERT_LE(cases.size() * kBlocksEach, kNumBlocks);

  std::vector<std::vector<int32_t>> outputs(cases.size());
  StepPlan plan;
  for (uint32_t slot = 0; slot < cases.size(); ++slot) {
    const std::vector<int32_t>& prompt = cases[slot].prompt;
    ASSERT_LE(prompt.size() + cases[slot].greedy.size(), kBlocksEach * kBlockTokens);
    std::vector<BlockId> blocks;  // interleaved with the other sequences'
    for (uint32_t i = 0; i < kBlocksEach; ++i) {
      blocks.push_back(BlockId{static_cast<int32_t>(i * cases.size() + slot)});
    }
    plan.slot_init.push_back({slot, {.temperature = 0}, blocks});
    plan.rows.push_back({slot, 0, static_cast<uint32_t>(prompt.size()), true, prompt});
  }
  while (!plan.rows.empty()) {
    const StepDone done = Execute(plan);
    plan = {};
    for (const SampledToken& sampled : done.sampled) {
      std::vector<int32_t>& output = outputs[sampled.slot];
      output.push_back(sampled.token);
      const bool finished =
          sampled.token == kEndOfSequence || output.size() == cases[sampled.slot].greedy.size();
      if (finished) continue;
      const auto position =
          static_cast<uint32_t>(cases[sampled.slot].prompt.size() + output.size() - 1);
      plan.rows.push_back({sampled.slot, position, 1, true, {}});
    }
  }
  for (size_t i = 0; i < cases.size(); ++i) EXPECT_EQ(outputs[i], cases[i].greedy) << "case " << i;

  server_->Send(ShutdownWorker{});
  for (int rank = 0; rank < GetParam(); ++rank) EXPECT_EQ(WaitForExit(), kExitOk) << Log(rank);
}

TEST_F(EngineWorkerProcess, ExitsCleanlyOnSigtermBetweenPlans) {
  Start(1);
  MakeReady(1);
  Execute({});
  ::kill(children_[0], SIGTERM);
  EXPECT_EQ(WaitForExit(), kExitOk);
  EXPECT_THAT(Log(0), HasSubstr("stopped"));
}

TEST_F(EngineWorkerProcess, ExitsCleanlyOnSigtermWhileItWaitsForTheServer) {
  Spawn(0);
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (Log(0).find("loaded") == std::string::npos) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline) << Log(0);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  ::kill(children_[0], SIGTERM);
  EXPECT_EQ(WaitForExit(), kExitOk);
}

TEST_F(EngineWorkerProcess, ALostServerEndsItWithTheReason) {
  Start(1);
  MakeReady(1);
  server_->Stop(0);
  EXPECT_EQ(WaitForExit(), kExitInternal);
  EXPECT_THAT(Log(0), HasSubstr("work_queue.sock is gone"));
}

TEST_F(EngineWorkerProcess, ABadPlanEndsItWithTheReason) {
  Start(1);
  MakeReady(1);
  server_->SendPlan({.group_epoch = kGroupEpoch,
                     .pool_epoch = kPoolEpoch,
                     .step = 1,
                     .slot_init = {{0, {}, {BlockId{99}}}}});
  EXPECT_EQ(inbox_.WaitForFault(), "slot 0: block 99 is not in 0 … 63");
  EXPECT_EQ(WaitForExit(), kExitInternal);
  EXPECT_THAT(Log(0), HasSubstr("slot 0: block 99 is not in 0 … 63"));
}

TEST_F(EngineWorkerProcess, AMissingModelExitsWithTheCheckpointsCode) {
  instance_.options.model = "models/none";
  Spawn(0);
  EXPECT_EQ(WaitForExit(), kExitCheckpoint);
  EXPECT_THAT(Log(0), HasSubstr("models/none"));
}

TEST_F(EngineWorkerProcess, ATruncatedCheckpointExitsWithTheCheckpointsCodeAndNamesTheFile) {
  const std::filesystem::path copy = std::filesystem::path(instance_.runtime_dir) / "model";
  std::filesystem::copy("models/poet", copy);
  const std::filesystem::path file = copy / "model-00002-of-00003.safetensors";
  std::filesystem::resize_file(file, std::filesystem::file_size(file) - 1);
  instance_.options.model = copy.string();
  Spawn(0);
  EXPECT_EQ(WaitForExit(), kExitCheckpoint);
  EXPECT_THAT(Log(0), HasSubstr("model-00002-of-00003.safetensors"));
}

TEST_F(EngineWorkerProcess, AnUnknownDeviceExitsAsUnavailable) {
  instance_.options.device = "cuda";
  Spawn(0);
  EXPECT_EQ(WaitForExit(), kExitUnavailable);
  EXPECT_THAT(Log(0), HasSubstr("--device cuda"));
}

TEST_F(EngineWorkerProcess, ASurvivorOfAKilledRankStillStopsCleanly) {
  Start(2);
  MakeReady(2);
  ::kill(children_[0], SIGKILL);
  EXPECT_EQ(WaitForExit(), 128 + SIGKILL);
  // The survivor takes the plan up and waits for its peer.
  server_->SendPlan({.group_epoch = kGroupEpoch,
                     .pool_epoch = kPoolEpoch,
                     .step = 1,
                     .slot_init = {{0, {.temperature = 0}, {BlockId{1}}}},
                     .rows = {{0, 0, 1, true, {3}}}});
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  ::kill(children_[0], SIGTERM);
  EXPECT_EQ(WaitForExit(), kExitOk);
}

}  // namespace
}  // namespace wintserve
