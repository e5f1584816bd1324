#include "kernels/cpu/token_counts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace wintserve::kernels::cpu {
namespace {

using sampling::kInPrompt;
using testing::ElementsAre;
using testing::FieldsAre;
using testing::IsEmpty;

TEST(TokenCounts, CountsGeneratedTokensAndMarksThoseOfThePrompt) {
  TokenCounts counts;
  counts.AddPrompt(std::vector<int32_t>{7, 3, 7, 7});
  counts.AddGenerated(3);
  counts.AddGenerated(103423);
  counts.AddGenerated(3);
  EXPECT_THAT(counts.occurrences(), ElementsAre(FieldsAre(7, kInPrompt),
                                                FieldsAre(3, kInPrompt + 2), FieldsAre(103423, 1)));
}

TEST(TokenCounts, StartsAnewAfterClear) {
  TokenCounts counts;
  counts.AddPrompt(std::vector<int32_t>{1, 2});
  counts.Clear();
  EXPECT_THAT(counts.occurrences(), IsEmpty());
  counts.AddGenerated(2);
  EXPECT_THAT(counts.occurrences(), ElementsAre(FieldsAre(2, 1)));
}

}  // namespace
}  // namespace wintserve::kernels::cpu
