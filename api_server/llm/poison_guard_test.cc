#include "api_server/llm/poison_guard.h"

#include <gtest/gtest.h>

namespace wintserve {
namespace {

TEST(PoisonGuard, OneFaultMakesNobodySuspicious) {
  PoisonGuard guard;
  EXPECT_EQ(guard.OnFault({1, 2}), std::nullopt);
  EXPECT_EQ(guard.OnFault({3}), std::nullopt);
  EXPECT_EQ(guard.isolated(), std::nullopt);
}

TEST(PoisonGuard, WhoWasInFlightTwiceRunsAloneAndFailsWithTheThird) {
  PoisonGuard guard;
  guard.OnFault({1, 2});
  EXPECT_EQ(guard.OnFault({2, 3}), std::nullopt);
  EXPECT_EQ(guard.isolated(), 2u);
  // Plans of before it ran alone prove nothing.
  EXPECT_EQ(guard.OnFault({2, 4}), std::nullopt);
  EXPECT_EQ(guard.isolated(), 2u);
  EXPECT_EQ(guard.OnFault({2}), 2u);
  EXPECT_EQ(guard.isolated(), std::nullopt);
  EXPECT_EQ(guard.OnFault({2}), std::nullopt);  // forgotten
}

TEST(PoisonGuard, SuspectsAreTriedOneAfterTheOther) {
  PoisonGuard guard;
  guard.OnFault({1, 2, 3});
  guard.OnFault({1, 2, 3});
  EXPECT_EQ(guard.isolated(), 1u);
  for (int i = 0; i < PoisonGuard::kProofTokens; ++i) {
    EXPECT_EQ(guard.isolated(), 1u);
    guard.OnToken(1);
    guard.OnToken(2);  // of a plan of before
  }
  EXPECT_EQ(guard.isolated(), 2u);
  EXPECT_EQ(guard.OnFault({2}), 2u);
  EXPECT_EQ(guard.isolated(), 3u);
  guard.OnEnded(3);
  EXPECT_EQ(guard.isolated(), std::nullopt);
  guard.OnFault({1});  // it was proved innocent of the others
  EXPECT_EQ(guard.isolated(), std::nullopt);
}

TEST(PoisonGuard, AFaultWithNothingInFlightAccusesNobody) {
  PoisonGuard guard;
  guard.OnFault({1});
  guard.OnFault({1});
  EXPECT_EQ(guard.OnFault({}), std::nullopt);
  EXPECT_EQ(guard.isolated(), 1u);
}

TEST(PoisonGuard, EndedRequestsAreForgotten) {
  PoisonGuard guard;
  guard.OnFault({1, 2});
  guard.OnEnded(1);
  guard.OnFault({1, 2});
  EXPECT_EQ(guard.isolated(), 2u);
  guard.OnEnded(2);
  EXPECT_EQ(guard.isolated(), std::nullopt);
}

}  // namespace
}  // namespace wintserve
