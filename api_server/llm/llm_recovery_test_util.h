// What the tests of deaths of engine workers and API servers share.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "api_server/llm/llm_test_util.h"

namespace wintserve {

class RecoveryTest : public LlmTest {
 protected:
  ~RecoveryTest() override {
    if (llm_ != nullptr) {
      EXPECT_TRUE(cache_.WaitUntilAllAvailable());
      llm_.reset();  // before the streams that it tells
    }
    EXPECT_THAT(cache_.refusals(), testing::IsEmpty());
    EXPECT_TRUE(cache_.CheckInvariants().ok()) << cache_.CheckInvariants();
    EXPECT_EQ(fatal_, expected_fatal_);
  }
  FakeWorkerOptions SlowWorker(uint32_t rank = 0) {
    FakeWorkerOptions worker = WorkerOptions(rank);
    worker.step_delay = std::chrono::milliseconds(1);
    return worker;
  }
  // Of two ranks.
  void StartTwo() { StartTwo(SlowWorker(0), SlowWorker(1)); }
  void StartTwo(FakeWorkerOptions first, FakeWorkerOptions second) {
    options_.world_size = 2;
    first.hello.world_size = second.hello.world_size = 2;
    Create();
    AddWorker(std::move(first));
    AddWorker(std::move(second));
    ASSERT_TRUE(WaitUntilReady()) << llm_->Readiness().reason;
  }
  // Six of them, for four slots.
  void SubmitStreams() {
    for (int i = 0; i < 6; ++i) {
      streams_.push_back(std::make_unique<Updates>());
      Submit(Request(std::string(70 + i, 'x'), 120), streams_[i].get());
    }
  }
  void ExpectStreamsAsWithoutFaults() {
    for (int i = 0; i < 6; ++i) {
      ASSERT_TRUE(streams_[i]->WaitFinished()) << llm_->Readiness().reason;
      EXPECT_TRUE(streams_[i]->last().error.ok()) << streams_[i]->last().error;
      EXPECT_EQ(streams_[i]->choice(0).text, Letters(70 + i, 120));
      EXPECT_EQ(streams_[i]->choice(0).num_tokens, 120);
    }
  }
  bool IsRecovering() { return llm_->Readiness().is_recovering; }

  std::vector<std::unique_ptr<Updates>> streams_;
  std::string expected_fatal_;
};

}  // namespace wintserve
