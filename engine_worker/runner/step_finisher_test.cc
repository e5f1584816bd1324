#include "engine_worker/runner/step_finisher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <optional>
#include <vector>

#include "common/check.h"
#include "kernels/cpu/cpu_backend.h"

namespace wintserve {
namespace {

// A point that a test lets pass.
class Gate {
 public:
  void Open(absl::Status status = absl::OkStatus()) {
    MutexLock lock(&mutex_);
    status_ = std::move(status);
    changed_.NotifyAll();
  }
  bool is_open() {
    MutexLock lock(&mutex_);
    return status_.has_value();
  }
  absl::Status Pass() {
    MutexLock lock(&mutex_);
    changed_.Wait(&mutex_, [this]() NO_THREAD_SAFETY_ANALYSIS { return status_.has_value(); });
    return *status_;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  std::optional<absl::Status> status_ GUARDED_BY(mutex_);
};

class GatedEvent : public kernels::Event {
 public:
  explicit GatedEvent(Gate* gate) : gate_(gate) {}
  bool IsDone() override { return gate_->is_open(); }
  absl::Status Wait() override { return gate_->Pass(); }
  int64_t MicrosecondsSince(const kernels::Event&) const override { return 5; }

 private:
  Gate* const gate_;
};

class StepFinisherTest : public testing::Test {
 protected:
  // A step that is done once its gate is open, and that of its copies, if it has some.
  std::unique_ptr<PendingStep> Step(uint64_t number, Gate* copies = nullptr) {
    auto ids = buffers_->Take();
    CHECK(ids.ok());
    return std::make_unique<PendingStep>(
        PendingStep::Work{
            .done = {.step = number},
            .begin = std::make_unique<GatedEvent>(&gates_[number]),
            .end = std::make_unique<GatedEvent>(&gates_[number]),
            .copies = copies == nullptr ? nullptr : std::make_unique<GatedEvent>(copies),
            .layout = StepResultLayout(1),
            .results = *std::move(ids)},
        buffers_);
  }

  std::unique_ptr<StepFinisher> NewFinisher() {
    return std::make_unique<StepFinisher>([this](const absl::StatusOr<StepDone>& done) {
      MutexLock lock(&mutex_);
      results_.push_back(done.ok() ? static_cast<int>(done->step) : -1);
      threads_.push_back(std::this_thread::get_id());
    });
  }

  std::vector<int> results() {
    MutexLock lock(&mutex_);
    return results_;
  }

  const std::unique_ptr<kernels::Backend> backend_ = kernels::cpu::CreateCpuBackend({});
  const std::shared_ptr<ResultBuffers> buffers_ =
      std::make_shared<ResultBuffers>(backend_.get(), StepResultLayout(1));
  Gate gates_[5];
  Mutex mutex_;
  std::vector<int> results_ GUARDED_BY(mutex_);
  std::vector<std::thread::id> threads_ GUARDED_BY(mutex_);
};

TEST_F(StepFinisherTest, AStepThatIsDoneIsHandedOnByTheThreadThatAddsIt) {
  const auto finisher = NewFinisher();
  gates_[1].Open();
  finisher->Add(Step(1));
  EXPECT_EQ(results(), std::vector<int>{1});
  MutexLock lock(&mutex_);
  EXPECT_EQ(threads_[0], std::this_thread::get_id());
}

TEST_F(StepFinisherTest, StepsAreHandedOnInTheirOrderWhateverIsDoneFirst) {
  const auto finisher = NewFinisher();
  finisher->Add(Step(1));
  gates_[2].Open();
  finisher->Add(Step(2));  // done, but not its turn
  finisher->Add(Step(3));
  EXPECT_FALSE(finisher->DrainFor(/*timeout_ms=*/20));
  EXPECT_TRUE(results().empty());
  gates_[3].Open();
  gates_[1].Open();
  finisher->Drain();
  EXPECT_EQ(results(), (std::vector<int>{1, 2, 3}));
}

// The cache manager uses their blocks and host slots again when it hears of the step.
TEST_F(StepFinisherTest, AStepIsNotDoneBeforeItsCopies) {
  Gate copies;
  const auto finisher = NewFinisher();
  gates_[1].Open();
  finisher->Add(Step(1, &copies));
  EXPECT_FALSE(finisher->DrainFor(/*timeout_ms=*/20));
  EXPECT_TRUE(results().empty());
  copies.Open();
  finisher->Drain();
  EXPECT_EQ(results(), std::vector<int>{1});
}

TEST_F(StepFinisherTest, AStepWhoseCopiesFailedHasFailed) {
  Gate copies;
  const auto finisher = NewFinisher();
  gates_[1].Open();
  copies.Open(absl::InternalError("the device is gone"));
  finisher->Add(Step(1, &copies));
  finisher->Drain();
  EXPECT_EQ(results(), std::vector<int>{-1});
}

TEST_F(StepFinisherTest, NothingFollowsAStepThatFailed) {
  const auto finisher = NewFinisher();
  finisher->Add(Step(1));
  finisher->Add(Step(2));
  gates_[2].Open();
  gates_[1].Open(absl::InternalError("the device is gone"));
  finisher->Drain();
  finisher->Add(Step(2));
  EXPECT_TRUE(finisher->DrainFor(/*timeout_ms=*/0));
  EXPECT_EQ(results(), std::vector<int>{-1});
}

TEST_F(StepFinisherTest, EndsOnlyAfterTheStepsThatItWasGiven) {
  auto finisher = NewFinisher();
  finisher->Add(Step(1));
  std::thread opener([this] { gates_[1].Open(); });
  finisher.reset();
  EXPECT_EQ(results(), std::vector<int>{1});
  opener.join();
}

}  // namespace
}  // namespace wintserve
