// Engine-worker processes that are told to stop before they are ready.
#include <gmock/gmock.h>

#include "common/exit_code.h"
#include "tests/integration/engine_worker_process.h"

namespace wintserve::testing_engine_worker {
namespace {

using testing::HasSubstr;
using testing::Not;

// Nothing is there to finish, so a worker neither waits nor complains.
class StopAtStart : public EngineWorkerProcess {
 protected:
  // Sends SIGTERM to the oldest child, which has to be gone at once.
  void ExpectAnImmediateEnd() {
    const auto begin = std::chrono::steady_clock::now();
    ::kill(children_[0], SIGTERM);
    EXPECT_EQ(WaitForExit(), kExitOk) << Log(0);
    // Below the 2 s that a plan in hand gets.
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(1'900));
    EXPECT_THAT(Log(0), Not(HasSubstr("ERROR")));
  }

  // Until the child has blocked SIGTERM, which is the first that it does.
  void WaitUntilItHeedsStops() {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    for (uint64_t blocked = 0; (blocked & (1ull << (SIGTERM - 1))) == 0;) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline);
      std::ifstream status(fmt::format("/proc/{}/status", children_[0]));
      for (std::string line; std::getline(status, line);) {
        if (line.starts_with("SigBlk:")) blocked = std::stoull(line.substr(7), nullptr, 16);
      }
    }
  }

  void WaitForLog(const std::string& text) {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (Log(0).find(text) == std::string::npos) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline) << Log(0);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }

  // A server that accepts and says nothing.
  UniqueFd Silence(const std::string& socket) {
    auto listener = ListenUnix(socket);
    CHECK(listener.ok(), "{}", listener.status().ToString());
    return *std::move(listener);
  }

  void StartServer(uint32_t world_size) {
    instance_.options.tensor_parallel_size = static_cast<int>(world_size);
    EngineWorkerProcess::StartServer(static_cast<int>(world_size));
  }

  // Tells rank 0 what it would be told if all ranks were there.
  void ConfigureAlone(uint32_t world_size) {
    hellos_ = inbox_.WaitForHellos(1);
    server_->Send(ConfigureWorker{.group_epoch = kGroupEpoch,
                                  .world_size = world_size,
                                  .max_slots = 16,
                                  .max_tokens = 2048,
                                  .max_sequence_tokens = 2048,
                                  .sampled_vocab_size = hellos_[0].vocab_size});
  }
};

TEST_F(StopAtStart, FromItsFirstLineOn) {
  StartServer(1);
  for (const int delay_ms : {0, 1, 3, 10, 20, 40, 80, 160, 320}) {
    SCOPED_TRACE(delay_ms);
    Spawn(0);
    WaitUntilItHeedsStops();
    std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms));
    ExpectAnImmediateEnd();
  }
}

TEST_F(StopAtStart, WhileItWaitsForTheServer) {
  Spawn(0);
  WaitForLog("loaded");
  ExpectAnImmediateEnd();
}

TEST_F(StopAtStart, WhileItWaitsToBeConfigured) {
  StartServer(1);
  Spawn(0);
  inbox_.WaitForHellos(1);
  ExpectAnImmediateEnd();
}

TEST_F(StopAtStart, WhileItWaitsForTheMemoryOfItsGroup) {
  StartServer(2);
  const UniqueFd supervisor = Silence(instance_.supervisor_socket());
  Spawn(0);
  ConfigureAlone(2);
  const auto peer = AcceptUnix(supervisor.get());
  ExpectAnImmediateEnd();
}

TEST_F(StopAtStart, WhileItWaitsForThePool) {
  StartServer(1);
  const UniqueFd cache_manager = Silence(instance_.memory_socket());
  Spawn(0);
  ConfigureAlone(1);
  SendAttachPool();
  const auto peer = AcceptUnix(cache_manager.get());
  ExpectAnImmediateEnd();
}

TEST_F(StopAtStart, WhileItWaitsForACacheManagerThatIsGone) {
  StartServer(1);
  Spawn(0);
  ConfigureAlone(1);
  SendAttachPool();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  ExpectAnImmediateEnd();
}

TEST_F(StopAtStart, WhileItWarmsUpAndAPeerIsMissing) {
  StartServer(2);
  supervisor_.emplace(instance_.supervisor_socket());
  auto memory_server = MemoryServer::Start(instance_.memory_socket(), instance_.token);
  ASSERT_TRUE(memory_server.ok());
  memory_server_ = *std::move(memory_server);
  Spawn(0);
  ConfigureAlone(2);
  hellos_.push_back(hellos_[0]);
  hellos_[1].rank = 1;
  PublishPool(kPoolEpoch);
  SendAttachPool();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  ExpectAnImmediateEnd();
}

TEST_F(StopAtStart, WhenTheServerWentJustBefore) {
  StartServer(1);
  Spawn(0);
  inbox_.WaitForHellos(1);
  server_->Stop(0);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  ExpectAnImmediateEnd();
}

}  // namespace
}  // namespace wintserve::testing_engine_worker
