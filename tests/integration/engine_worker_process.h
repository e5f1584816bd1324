// Real engine-worker processes on the demo model, driven through their real sockets. The test
// stands in for the API server, the cache manager and the launcher.
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "api_server/work_queue/server/work_queue_server.h"
#include "cache_manager/memory/host_pool_memory.h"
#include "cache_manager/memory/memory_server.h"
#include "cache_manager/memory/pool_memory.h"
#include "common/check.h"
#include "common/config/instance.h"
#include "common/mutex.h"
#include "common/temp_dir_test_util.h"
#include "common/unix_socket.h"
#include "proto/supervisor.pb.h"

namespace wintserve::testing_engine_worker {

inline constexpr uint64_t kGroupEpoch = 11;
inline constexpr uint64_t kPoolEpoch = 12;
inline constexpr uint32_t kNumBlocks = 64;
inline constexpr uint32_t kNumHostSlots = 4;
inline constexpr int kBlockTokens = 64;
inline constexpr int32_t kEndOfSequence = 2;
inline constexpr std::chrono::seconds kPatience(60);

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
      proto::SupervisorReply reply;
      reply.set_text("ok");
      int fd = -1;
      // The other request that comes tells of a load that takes long, as on a busy machine.
      if (request.has_group_memory()) {
        const proto::GroupMemory& wanted = request.group_memory();
        if (!memories.contains(wanted.group_epoch())) {
          auto memory = MappedMemory::Create("group", static_cast<int64_t>(wanted.size_bytes()));
          CHECK(memory.ok(), "{}", memory.status().ToString());
          memories[wanted.group_epoch()] = *std::move(memory);
        }
        fd = memories[wanted.group_epoch()].fd();
      }
      const bool is_sent = SendPacket(peer->get(), reply.SerializeAsString(), fd).ok();
      CHECK(is_sent || !request.has_group_memory());  // nobody waits long for the others
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
        .on_hello =
            [this](const WorkerHello& hello) {
              Note([&]() NO_THREAD_SAFETY_ANALYSIS { hellos_.push_back(hello); });
            },
        .on_ready =
            [this](uint32_t, const ReadyMessage&) {
              Note([&]() NO_THREAD_SAFETY_ANALYSIS { ++num_ready_; });
            },
        .on_step_done =
            [this](uint32_t rank, StepDone done) {
              Note([&]() NO_THREAD_SAFETY_ANALYSIS { steps_[done.step][rank] = std::move(done); });
            },
        .on_heartbeat = [](uint32_t, const HeartbeatMessage&) {},
        .on_pool_detached =
            [this](uint32_t, const PoolDetachedMessage&) {
              Note([&]() NO_THREAD_SAFETY_ANALYSIS { ++num_detached_; });
            },
        .on_fault =
            [this](uint32_t, const FaultMessage& fault) {
              Note([&]() NO_THREAD_SAFETY_ANALYSIS { fault_ = fault.text; });
            },
        .on_aborted =
            [this](uint32_t rank, const AbortedMessage& aborted) {
              Note([&]() NO_THREAD_SAFETY_ANALYSIS { aborted_[aborted.group_epoch].insert(rank); });
            },
        .on_detached =
            [this](uint32_t, uint64_t worker_id, const absl::Status&) {
              Note([&]() NO_THREAD_SAFETY_ANALYSIS { gone_.insert(worker_id); });
            },
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
  void WaitForDetached(int count) {
    MutexLock lock(&mutex_);
    CHECK(WaitFor([&]() NO_THREAD_SAFETY_ANALYSIS { return num_detached_ == count; }));
  }
  void WaitForAborted(uint64_t group_epoch, uint32_t rank) {
    MutexLock lock(&mutex_);
    CHECK(
        WaitFor([&]() NO_THREAD_SAFETY_ANALYSIS { return aborted_[group_epoch].contains(rank); }));
  }
  void WaitForTheEndOf(uint64_t worker_id) {
    MutexLock lock(&mutex_);
    CHECK(WaitFor([&]() NO_THREAD_SAFETY_ANALYSIS { return gone_.contains(worker_id); }));
  }
  // By rank.
  std::map<uint32_t, StepDone> WaitForStep(uint64_t step, size_t num_ranks) {
    MutexLock lock(&mutex_);
    CHECK(WaitFor([&]() NO_THREAD_SAFETY_ANALYSIS { return steps_[step].size() == num_ranks; }),
          "step {}", step);
    return steps_[step];
  }
  bool HasStep(uint64_t step) {
    MutexLock lock(&mutex_);
    return steps_.contains(step);
  }
  bool HasFault() {
    MutexLock lock(&mutex_);
    return !fault_.empty();
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
  int num_detached_ GUARDED_BY(mutex_) = 0;
  std::map<uint64_t, std::map<uint32_t, StepDone>> steps_ GUARDED_BY(mutex_);
  std::map<uint64_t, std::set<uint32_t>> aborted_ GUARDED_BY(mutex_);  // ranks by group epoch
  std::set<uint64_t> gone_ GUARDED_BY(mutex_);  // worker ids of streams that have ended
  std::string fault_ GUARDED_BY(mutex_);
};

class EngineWorkerProcess : public testing::Test {
 protected:
  EngineWorkerProcess() {
    instance_.runtime_dir = directory_.path().string();
    instance_.token = std::string(32, 't');
    instance_.options.model = "models/poet";
  }

  ~EngineWorkerProcess() override {
    for (const pid_t child : children_) {
      ::kill(child, SIGKILL);
      ::waitpid(child, nullptr, 0);
    }
    server_.reset();
  }

  // Everything that a worker expects to find, and the workers.
  void Start(int world_size) {
    instance_.options.tensor_parallel_size = world_size;
    supervisor_.emplace(instance_.supervisor_socket());
    auto memory_server = MemoryServer::Start(instance_.memory_socket(), instance_.token);
    CHECK(memory_server.ok());
    memory_server_ = *std::move(memory_server);
    StartServer(world_size);
    for (int rank = 0; rank < world_size; ++rank) Spawn(rank);
  }

  void StartServer(int world_size) {
    auto server = WorkQueueServer::Start({.unix_socket = instance_.work_queue_socket(),
                                          .token = instance_.token,
                                          .world_size = static_cast<uint32_t>(world_size)},
                                         inbox_.Events());
    CHECK(server.ok(), "{}", server.status().ToString());
    server_ = *std::move(server);
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
    Configure(world_size);
    PublishPool(kPoolEpoch);
    SendAttachPool();
    inbox_.WaitForReady(world_size);
  }

  void Configure(int world_size) {
    WaitForWorkers(world_size);
    SendConfigure(world_size);
  }

  void WaitForWorkers(int world_size) {
    hellos_ = inbox_.WaitForHellos(world_size);
    std::sort(hellos_.begin(), hellos_.end(),
              [](const WorkerHello& a, const WorkerHello& b) { return a.rank < b.rank; });
  }

  void SendConfigure(int world_size) {
    server_->Send(ConfigureWorker{.group_epoch = group_epoch_,
                                  .world_size = static_cast<uint32_t>(world_size),
                                  .max_slots = 16,
                                  .max_tokens = 2048,
                                  .max_sequence_tokens = 2048,
                                  .sampled_vocab_size = hellos_[0].vocab_size,
                                  .stop_ids = {kEndOfSequence}});
  }

  void PublishPool(uint64_t pool_epoch) {
    pool_epoch_ = pool_epoch;
    std::vector<uint64_t> block_bytes(hellos_.size());
    for (const WorkerHello& hello : hellos_) block_bytes[hello.rank] = hello.kv_block_bytes;
    auto pool = HostPoolMemory::Create({.num_blocks = kNumBlocks,
                                        .block_bytes_by_rank = block_bytes,
                                        .num_host_slots = kNumHostSlots},
                                       int64_t{1} << 40);
    CHECK(pool.ok(), "{}", pool.status().ToString());
    memory_server_->Publish(pool_epoch, *std::move(pool));
  }

  void SendAttachPool() {
    server_->Send(AttachPool{.pool_epoch = pool_epoch_,
                             .memory_socket = instance_.memory_socket(),
                             .num_blocks = kNumBlocks,
                             .num_host_slots = kNumHostSlots});
  }

  // Numbers and chains the plan. Returns its step.
  uint64_t SendPlan(StepPlan plan) {
    plan.group_epoch = group_epoch_;
    plan.pool_epoch = pool_epoch_;
    plan.step = ++step_;
    plan.previous_plan_hash = plan_hash_;
    plan_hash_ = server_->SendPlan(plan);
    return step_;
  }

  // Sends the plan, and waits until every rank has executed it.
  StepDone Execute(const StepPlan& plan) {
    const uint64_t step = SendPlan(plan);
    const auto done = inbox_.WaitForStep(step, children_.size());
    for (const auto& [rank, theirs] : done) {
      EXPECT_EQ(theirs.plan_hash, plan_hash_);
      EXPECT_EQ(theirs.sampled_digest, done.at(0).sampled_digest) << "rank " << rank;
    }
    return done.at(0);
  }

  // The prompt from `begin` on in rows of `chunk` tokens, then sampled tokens, in slot 0 on the
  // given blocks. The first plan brings `copies`.
  std::vector<int32_t> Generate(const std::vector<int32_t>& prompt, size_t begin, size_t chunk,
                                const std::vector<BlockId>& blocks,
                                std::vector<BlockCopy> copies = {}) {
    StepPlan plan{.slot_init = {{0, kSampling, blocks}}, .copies = std::move(copies)};
    std::vector<int32_t> output;
    while (begin < prompt.size()) {
      const size_t end = std::min(prompt.size(), begin + chunk);
      plan.rows = {{0,
                    static_cast<uint32_t>(begin),
                    static_cast<uint32_t>(end - begin),
                    end == prompt.size(),
                    {prompt.begin() + begin, prompt.begin() + end}}};
      for (const SampledToken& sampled : Execute(plan).sampled) output.push_back(sampled.token);
      plan = {};
      begin = end;
    }
    while (output.size() < kNumSampled) {
      const auto position = static_cast<uint32_t>(prompt.size() + output.size() - 1);
      output.push_back(Execute({.rows = {{0, position, 1, true, {}}}}).sampled.at(0).token);
    }
    Execute({.slot_release = {0}});
    return output;
  }

  static constexpr size_t kNumSampled = 20;
  static constexpr SamplingParams kSampling = {.temperature = 0.9f, .top_p = 0.95f, .seed = 77};

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

  const TempDir directory_;
  Instance instance_;
  Inbox inbox_;
  std::optional<Supervisor> supervisor_;
  std::unique_ptr<MemoryServer> memory_server_;
  std::unique_ptr<WorkQueueServer> server_;
  std::vector<pid_t> children_;
  std::vector<WorkerHello> hellos_;  // by rank
  uint64_t group_epoch_ = kGroupEpoch;
  uint64_t pool_epoch_ = 0;
  uint64_t step_ = 0;
  uint64_t plan_hash_ = 0;
};

}  // namespace wintserve::testing_engine_worker
