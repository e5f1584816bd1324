#include "engine_worker/runner/step_graphs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "kernels/cpu/cpu_backend.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

TEST(StepGraphs, SizesGrowByHalvesOfADoublingUpToTheLargestBatch) {
  EXPECT_THAT(StepGraphs::SizesUpTo(0), IsEmpty());
  EXPECT_THAT(StepGraphs::SizesUpTo(1), ElementsAre(1));
  EXPECT_THAT(StepGraphs::SizesUpTo(3), ElementsAre(1, 2, 3));
  EXPECT_THAT(StepGraphs::SizesUpTo(24), ElementsAre(1, 2, 4, 8, 16, 24));
  EXPECT_THAT(StepGraphs::SizesUpTo(30), ElementsAre(1, 2, 4, 8, 16, 24, 30));
  EXPECT_THAT(StepGraphs::SizesUpTo(256),
              ElementsAre(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256));
}

class StepGraphsTest : public testing::Test {
 protected:
  // A pass of n rows leaves n in last_pass_. `failing` rows cannot be prepared.
  StepGraphs::PrepareFn Prepare(int64_t failing = 0) {
    return [this, failing](int64_t num_rows,
                           kernels::ConstRows*) -> absl::StatusOr<std::function<absl::Status()>> {
      EXPECT_EQ(graphs_.Find(num_rows), nullptr) << "a pass that is prepared must not be a graph";
      if (num_rows == failing) return absl::UnavailableError("a peer is gone");
      return [this, num_rows] {
        last_pass_ = num_rows;
        return absl::OkStatus();
      };
    };
  }

  const std::unique_ptr<kernels::Backend> backend_ = kernels::cpu::CreateCpuBackend({});
  StepGraphs graphs_{backend_.get()};
  int64_t last_pass_ = 0;
};

TEST_F(StepGraphsTest, FindGivesTheSmallestThatIsLargeEnough) {
  ASSERT_TRUE(graphs_.CaptureUpTo(20, Prepare()).ok());
  const int64_t expected[] = {1, 1, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 20};
  for (int64_t rows = 1; rows <= 17; ++rows) {
    const StepGraphs::Entry* entry = graphs_.Find(rows);
    ASSERT_NE(entry, nullptr) << rows;
    EXPECT_EQ(entry->num_rows, expected[rows]) << rows;
    ASSERT_TRUE(backend_->Launch(*entry->graph).ok());
    EXPECT_EQ(last_pass_, entry->num_rows);
    EXPECT_EQ(entry->graph->name(), "'decode of " + std::to_string(entry->num_rows) + " rows'");
  }
  EXPECT_EQ(graphs_.Find(21), nullptr);
  graphs_.Clear();
  EXPECT_EQ(graphs_.Find(1), nullptr);
}

TEST_F(StepGraphsTest, AfterAnErrorThereAreNone) {
  EXPECT_EQ(graphs_.CaptureUpTo(20, Prepare(/*failing=*/4)).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(graphs_.size(), 0);
  EXPECT_TRUE(graphs_.CaptureUpTo(20, Prepare()).ok());
}

}  // namespace
}  // namespace wintserve
