#include "launcher/loading_bar.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr int64_t kGib = int64_t{1} << 30;
constexpr int kWide = 100;
const LoadingBar::Time kStart = LoadingBar::Time(std::chrono::hours(1));

std::string RowOf(LoadingBar* bar, LoadingBar::Time now) { return bar->Row(now, kWide, false); }

TEST(LoadingBar, IsNotThereWhileNothingLoads) {
  LoadingBar bar(1);
  EXPECT_FALSE(bar.IsDue(kStart));
  EXPECT_EQ(bar.next_time(), std::nullopt);
  EXPECT_EQ(RowOf(&bar, kStart), "");
  bar.Report(0, kGib, kGib, kStart);  // late: we have not heard that it loads
  EXPECT_FALSE(bar.IsDue(kStart + seconds(1)));
  EXPECT_EQ(RowOf(&bar, kStart + seconds(1)), "");
}

TEST(LoadingBar, SaysHowMuchOfWhatHowFastAndHowLongYet) {
  LoadingBar bar(1);
  bar.Report(0, 2 * kGib, 16 * kGib, kStart);
  EXPECT_THAT(RowOf(&bar, kStart), ::testing::EndsWith("  12%  2.0/16.0 GiB"));
  bar.Report(0, 4 * kGib, 16 * kGib, kStart + seconds(4));
  // What was there when we first heard of it tells nothing of the speed: 2 GiB came in 4 s.
  EXPECT_EQ(RowOf(&bar, kStart + seconds(4)),
            "loading ##########------------------------------   25%  4.0/16.0 GiB  24 s left  "
            "512 MiB/s");
}

TEST(LoadingBar, RanksAreAddedUpAndTheFirstWhoHasLoadedCountsOn) {
  LoadingBar bar(2);
  bar.Report(0, 1 * kGib, 8 * kGib, kStart);
  bar.Report(1, 3 * kGib, 8 * kGib, kStart);
  EXPECT_THAT(RowOf(&bar, kStart), StartsWith("loading 2 ranks ####"));
  EXPECT_THAT(RowOf(&bar, kStart), HasSubstr(" 25%  4.0/16.0 GiB"));
  bar.Report(0, 8 * kGib, 8 * kGib, kStart + seconds(1));
  EXPECT_THAT(RowOf(&bar, kStart + seconds(1)), HasSubstr("11.0/16.0 GiB"));
  bar.Report(1, 8 * kGib, 8 * kGib, kStart + seconds(2));
  EXPECT_TRUE(bar.IsDue(kStart + seconds(2)));
  EXPECT_EQ(RowOf(&bar, kStart + seconds(2)), "");
  EXPECT_FALSE(bar.IsDue(kStart + seconds(9)));
  EXPECT_EQ(bar.next_time(), std::nullopt);
}

TEST(LoadingBar, MaySayItInLines) {
  LoadingBar bar(2, LoadingBar::kLineInterval);
  bar.Report(0, 1 * kGib, 8 * kGib, kStart);
  bar.Report(1, 3 * kGib, 8 * kGib, kStart);
  EXPECT_FALSE(bar.IsDue(kStart + milliseconds(4999))) << "short loads are silent";
  for (int second = 1; second <= 5; ++second) {
    bar.Report(0, 1 * kGib, 8 * kGib, kStart + seconds(second));
    bar.Report(1, 8 * kGib, 8 * kGib, kStart + seconds(second));
  }
  EXPECT_TRUE(bar.IsDue(kStart + seconds(5)));
  EXPECT_EQ(bar.Line(kStart + seconds(5)),
            "loading 2 ranks: 9.0 of 16.0 GiB (56%), 1.00 GiB/s, 7 s left");
  EXPECT_FALSE(bar.IsDue(kStart + milliseconds(5100)));
  bar.Report(0, 8 * kGib, 8 * kGib, kStart + seconds(6));
  EXPECT_EQ(bar.Line(kStart + seconds(6)), "") << "what has loaded is not told";
  EXPECT_EQ(bar.next_time(), std::nullopt);
}

TEST(LoadingBar, AReplacementIsNamedAndBeginsAnew) {
  LoadingBar bar(4);
  for (const int rank : {0, 1, 2, 3}) bar.Report(rank, kGib, 2 * kGib, kStart);
  EXPECT_THAT(RowOf(&bar, kStart), StartsWith("loading 4 ranks "));
  for (const int rank : {0, 1, 2, 3}) bar.Report(rank, 2 * kGib, 2 * kGib, kStart);
  EXPECT_EQ(RowOf(&bar, kStart), "");
  const auto later = kStart + seconds(1000);
  bar.Report(2, 0, 2 * kGib, later);
  bar.Report(2, kGib, 2 * kGib, later + seconds(1));
  const std::string row = RowOf(&bar, later + seconds(1));
  EXPECT_THAT(row, StartsWith("loading rank 2 ####"));
  EXPECT_THAT(row, HasSubstr("1.00 GiB/s"));
}

TEST(LoadingBar, AProcessThatEndsIsTakenAwayAtOnce) {
  LoadingBar bar(2);
  bar.Report(0, kGib, 8 * kGib, kStart);
  bar.Report(1, kGib, 8 * kGib, kStart);
  EXPECT_THAT(RowOf(&bar, kStart), StartsWith("loading 2 ranks "));
  EXPECT_FALSE(bar.IsDue(kStart));
  bar.Remove(1);
  EXPECT_TRUE(bar.IsDue(kStart));
  EXPECT_THAT(RowOf(&bar, kStart), StartsWith("loading rank 0 "));
  bar.Remove(1);  // does not load
  EXPECT_FALSE(bar.IsDue(kStart));
  bar.Remove(0);
  EXPECT_TRUE(bar.IsDue(kStart));
  EXPECT_EQ(RowOf(&bar, kStart), "");
  bar.Report(1, kGib, 8 * kGib, kStart + seconds(2));
  bar.Clear();
  EXPECT_FALSE(bar.IsDue(kStart + seconds(2))) << "nothing of it was shown yet";
}

TEST(LoadingBar, AWorkerThatFallsSilentIsNotShownForEver) {
  LoadingBar bar(1);
  bar.Report(0, kGib, 8 * kGib, kStart);
  EXPECT_NE(RowOf(&bar, kStart + LoadingBar::kPatience - milliseconds(1)), "");
  EXPECT_TRUE(bar.IsDue(kStart + LoadingBar::kPatience));
  EXPECT_EQ(RowOf(&bar, kStart + LoadingBar::kPatience), "");
  // It was held up: it is shown again, and a pause is no part of the speed.
  bar.Report(0, 2 * kGib, 8 * kGib, kStart + seconds(100));
  bar.Report(0, 4 * kGib, 8 * kGib, kStart + seconds(101));
  EXPECT_THAT(RowOf(&bar, kStart + seconds(101)), HasSubstr("2.00 GiB/s"));
}

TEST(LoadingBar, IsDrawnAFewTimesASecondHoweverOftenWorkersTell) {
  LoadingBar bar(1);
  int num_rows = 0;
  for (milliseconds passed(0); passed < seconds(10); passed += milliseconds(1)) {
    const auto now = kStart + passed;
    bar.Report(0, passed.count(), 10'000, now);
    if (!bar.IsDue(now)) continue;
    ++num_rows;
    EXPECT_NE(RowOf(&bar, now), "");
    EXPECT_EQ(bar.next_time(), now + LoadingBar::kRowInterval);
  }
  EXPECT_EQ(num_rows, seconds(10) / LoadingBar::kRowInterval - 1);
}

TEST(LoadingBar, FitsTheTerminalWhateverItsWidth) {
  LoadingBar bar(8);
  for (int rank = 0; rank < 8; ++rank) bar.Report(rank, rank * kGib, 8 * kGib, kStart);
  for (int columns = 0; columns < 130; ++columns) {
    EXPECT_LE(bar.Row(kStart + seconds(1), columns, false).size(), static_cast<size_t>(columns));
  }
}

TEST(LoadingBar, SumsOfTheLargestReportsFit) {
  LoadingBar bar(64);
  constexpr int64_t kMost = int64_t{1} << 50;
  for (int rank = 0; rank < 64; ++rank) bar.Report(rank, kMost - 1, kMost, kStart);
  EXPECT_THAT(RowOf(&bar, kStart + seconds(1)), HasSubstr("99%  67108864.0/67108864.0 GiB"));
}

}  // namespace
}  // namespace wintserve
