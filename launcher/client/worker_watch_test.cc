#include "launcher/client/worker_watch.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "launcher/client/supervisor_socket_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;

constexpr int64_t kTimeoutMs = 60'000;

class WorkerWatchTest : public testing::Test {
 protected:
  WorkerWatchEvents Events() {
    return {.on_watching = [this](bool watching) { Add(watching ? "watching" : "lost"); },
            .on_exit =
                [this](const WorkerExitNotice& notice) {
                  Add(fmt::format("exit {} {} signal {} code {} {}", notice.rank, notice.worker_id,
                                  notice.signal, notice.code, notice.kv_trusted));
                }};
  }
  void Add(const std::string& line) {
    MutexLock lock(&mutex_);
    lines_.push_back(line);
    changed_.NotifyAll();
  }
  std::vector<std::string> WaitFor(size_t count) {
    MutexLock lock(&mutex_);
    changed_.WaitFor(&mutex_, std::chrono::milliseconds(kTimeoutMs),
                     [&]() NO_THREAD_SAFETY_ANALYSIS { return lines_.size() >= count; });
    return lines_;
  }
  static void TellExit(int fd, uint32_t rank, uint64_t worker_id) {
    proto::WorkerExit notice;
    notice.set_rank(rank);
    notice.set_worker_id(worker_id);
    notice.set_signal(9);
    notice.set_kv_trusted(true);
    EXPECT_TRUE(SendPacket(fd, notice.SerializeAsString()).ok());
  }

  TestSupervisorSocket launcher_;
  Mutex mutex_;
  CondVar changed_;
  std::vector<std::string> lines_;
};

TEST_F(WorkerWatchTest, TellsEveryExitAndComesBackWhenTheConnectionBreaks) {
  launcher_.Listen();
  WorkerWatch watch(launcher_.path(), TestSupervisorSocket::kToken, Events());
  {
    const auto [connection, request] = launcher_.Serve();
    EXPECT_TRUE(request.has_watch_workers());
    TellExit(connection.get(), 0, 7);
    TellExit(connection.get(), 1, 8);
    EXPECT_THAT(WaitFor(3), ElementsAre("watching", "exit 0 7 signal 9 code 0 true",
                                        "exit 1 8 signal 9 code 0 true"));
  }
  EXPECT_EQ(WaitFor(4).back(), "lost");
  const auto [connection, request] = launcher_.Serve();
  EXPECT_TRUE(request.has_watch_workers());
  EXPECT_EQ(WaitFor(5).back(), "watching");
  TellExit(connection.get(), 1, 9);
  EXPECT_EQ(WaitFor(6).back(), "exit 1 9 signal 9 code 0 true");
}

TEST_F(WorkerWatchTest, HasAWorkerEndedWhileItWatches) {
  launcher_.Listen();
  WorkerWatch watch(launcher_.path(), TestSupervisorSocket::kToken, Events());
  const auto watching = launcher_.Serve();
  WaitFor(1);
  watch.EndWorker(1, 0xabc, /*at_fault=*/true);
  const auto [connection, request] = launcher_.Serve();
  ASSERT_TRUE(request.has_end_worker());
  EXPECT_EQ(request.end_worker().rank(), 1u);
  EXPECT_EQ(request.end_worker().worker_id(), 0xabcu);
  EXPECT_TRUE(request.end_worker().at_fault());
  TellExit(watching.first.get(), 1, 0xabc);
  EXPECT_EQ(WaitFor(2).back(), "exit 1 2748 signal 9 code 0 true");
}

TEST_F(WorkerWatchTest, ALauncherThatIsNotThereIsWaitedForAndStoppingIsQuick) {
  {
    WorkerWatch watch(launcher_.path(), TestSupervisorSocket::kToken, Events());
    watch.EndWorker(0, 1, /*at_fault=*/false);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    launcher_.Listen();
    while (!launcher_.Serve().second.has_watch_workers()) {
    }
    EXPECT_EQ(WaitFor(1).front(), "watching");
  }
  const auto start = std::chrono::steady_clock::now();
  { WorkerWatch watch(launcher_.path() + ".nobody", "secret", Events()); }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

TEST_F(WorkerWatchTest, WhatIsNoExitEndsTheConnection) {
  launcher_.Listen();
  WorkerWatch watch(launcher_.path(), TestSupervisorSocket::kToken, Events());
  const auto connection = launcher_.Serve();
  WaitFor(1);
  EXPECT_TRUE(SendPacket(connection.first.get(), "rubbish").ok());
  EXPECT_EQ(WaitFor(2).back(), "lost");
}

}  // namespace
}  // namespace wintserve
