#include "launcher/client/load_reporter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <thread>

#include "launcher/client/supervisor_socket_test_util.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kOften(5);

class LoadReporterTest : public testing::Test {
 protected:
  LoadReporterTest() { launcher_.Listen(); }

  LoadReporter::Place Place() const {
    return {launcher_.path(), TestSupervisorSocket::kToken, 3, 0xfedcba9876543210};
  }

  // The next report, answered with that.
  proto::LoadProgress Serve(uint32_t status_code = 0) {
    const auto [connection, request] = launcher_.Serve(status_code);
    EXPECT_TRUE(request.has_load_progress());
    EXPECT_EQ(request.load_progress().rank(), 3u);
    EXPECT_EQ(request.load_progress().worker_id(), 0xfedcba9876543210);
    return request.load_progress();
  }
  // Reports from before may be on their way, on a slow machine several whose senders gave up.
  bool ServeUntil(uint64_t done_bytes) {
    for (int i = 0; i < 1000 && !HasFailure(); ++i) {
      if (Serve().done_bytes() == done_bytes) return true;
    }
    return false;
  }

  TestSupervisorSocket launcher_;
};

TEST_F(LoadReporterTest, TellsWhatItKnowsAgainAndAgainAndAtLastThatAllIsLoaded) {
  LoadReporter reporter(Place(), kOften);
  EXPECT_FALSE(launcher_.SomebodyCalls(10 * kOften)) << "it knows nothing yet";
  reporter.Set(0, 1000);
  for (int i = 0; i < 3; ++i) {
    const proto::LoadProgress report = Serve(/*status_code=*/i == 1 ? 3 : 0);
    EXPECT_EQ(report.done_bytes(), 0u);
    EXPECT_EQ(report.total_bytes(), 1000u);
  }
  reporter.Set(400, 1000);
  EXPECT_TRUE(ServeUntil(400));
  reporter.Set(1000, 1000);
  EXPECT_TRUE(ServeUntil(1000));
  EXPECT_FALSE(launcher_.SomebodyCalls(20 * kOften)) << "there is no more to tell";
}

TEST_F(LoadReporterTest, TellsThatAllIsLoadedThoughItGoesAtOnce) {
  auto reporter = std::make_optional<LoadReporter>(Place(), kOften);
  reporter->Set(1, 1000);
  Serve();
  std::thread goes([&] {
    reporter->Set(1000, 1000);
    reporter.reset();
  });
  EXPECT_TRUE(ServeUntil(1000));
  goes.join();
}

TEST_F(LoadReporterTest, ALoadThatIsShortIsSilent) {
  {
    LoadReporter reporter(Place(), std::chrono::hours(1));
    reporter.Set(0, 1000);
    reporter.Set(1000, 1000);
  }
  EXPECT_FALSE(launcher_.SomebodyCalls(milliseconds(0)));
}

TEST_F(LoadReporterTest, ALauncherThatDoesNotAnswerOrIsGoneHoldsUpNobodyForLong) {
  for (const bool is_there : {true, false}) {
    if (!is_there) launcher_.Close();
    auto reporter = std::make_optional<LoadReporter>(Place(), milliseconds(1));
    reporter->Set(1, 1000);
    std::this_thread::sleep_for(milliseconds(50));  // a report is under way
    const auto begin = std::chrono::steady_clock::now();
    reporter.reset();
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
  }
}

TEST(IsLoadingLine, KnowsTheLinesOfTheLogAboutLoadingAndNoOthers) {
  const std::string head = "INFO     2026-01-02 03:04:05,678 1234 engine_worker.0: ";
  EXPECT_TRUE(IsLoadingLine(head + "loading: 12.3 of 87.4 GiB (14%), 2.13 GiB/s, 35 s left"));
  EXPECT_TRUE(IsLoadingLine(head + "loading, rank 0 of 2: 12.3 of 87.4 GiB (14%)"));
  const std::string others[] = {
      head + "loaded models/poet in 0.2 s",
      head + "loading models/poet has got no further for 300 s",
      head + "warning: loading: 1",
      head + "loading",
      "ERROR    2026-01-02 03:04:05,678 1234 engine_worker.0: loading: failed",
      "INFO",
      "loading: 12.3",
      "",
  };
  for (const std::string& other : others) {
    EXPECT_FALSE(IsLoadingLine(other)) << other;
  }
}

}  // namespace
}  // namespace wintserve
