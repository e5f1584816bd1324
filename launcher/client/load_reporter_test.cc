#include "launcher/client/load_reporter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>

#include <filesystem>
#include <optional>
#include <string>
#include <thread>

#include "common/unix_socket.h"
#include "proto/supervisor.pb.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;

constexpr int64_t kTimeoutMs = 10'000;
constexpr milliseconds kOften(5);

// A launcher's socket, served by hand from the test's thread.
class LoadReporterTest : public testing::Test {
 protected:
  LoadReporterTest() {
    std::string path = (std::filesystem::temp_directory_path() / "load_reporter_XXXXXX").string();
    EXPECT_NE(::mkdtemp(path.data()), nullptr);
    directory_ = path;
    auto listener = ListenUnix(this->path());
    EXPECT_TRUE(listener.ok()) << listener.status();
    listener_ = *std::move(listener);
  }
  ~LoadReporterTest() override { std::filesystem::remove_all(directory_); }

  std::string path() const { return (directory_ / "supervisor.sock").string(); }
  LoadReporter::Place Place() const { return {path(), "secret", 3, 0xfedcba9876543210}; }

  // The next report, answered with that.
  proto::LoadProgress Serve(uint32_t status_code = 0) {
    auto peer = AcceptUnix(listener_.get());
    EXPECT_TRUE(peer.ok()) << peer.status();
    const auto packet = ReceivePacket(peer->get(), kTimeoutMs);
    EXPECT_TRUE(packet.ok()) << packet.status();
    proto::SupervisorRequest request;
    EXPECT_TRUE(request.ParseFromString(packet->bytes));
    EXPECT_EQ(request.token(), "secret");
    EXPECT_TRUE(request.has_load_progress());
    EXPECT_EQ(request.load_progress().rank(), 3u);
    EXPECT_EQ(request.load_progress().worker_id(), 0xfedcba9876543210);
    proto::SupervisorReply reply;
    reply.set_status_code(status_code);
    reply.set_text("a reason");
    EXPECT_TRUE(SendPacket(peer->get(), reply.SerializeAsString()).ok());
    return request.load_progress();
  }
  bool SomebodyCalls(milliseconds within) {
    pollfd wait = {listener_.get(), POLLIN, 0};
    return ::poll(&wait, 1, static_cast<int>(within.count())) > 0;
  }

  std::filesystem::path directory_;
  UniqueFd listener_;
};

TEST_F(LoadReporterTest, TellsWhatItKnowsAgainAndAgainAndAtLastThatAllIsLoaded) {
  LoadReporter reporter(Place(), kOften);
  EXPECT_FALSE(SomebodyCalls(10 * kOften)) << "it knows nothing yet";
  reporter.Set(0, 1000);
  for (int i = 0; i < 3; ++i) {
    const proto::LoadProgress report = Serve(/*status_code=*/i == 1 ? 3 : 0);
    EXPECT_EQ(report.done_bytes(), 0u);
    EXPECT_EQ(report.total_bytes(), 1000u);
  }
  reporter.Set(400, 1000);
  uint64_t done_bytes = 0;
  for (int i = 0; i < 3; ++i) done_bytes = Serve().done_bytes();  // one may have been on its way
  EXPECT_EQ(done_bytes, 400u);
  reporter.Set(1000, 1000);
  for (int i = 0; i < 3 && done_bytes < 1000; ++i) done_bytes = Serve().done_bytes();
  EXPECT_EQ(done_bytes, 1000u);
  EXPECT_FALSE(SomebodyCalls(20 * kOften)) << "there is no more to tell";
}

TEST_F(LoadReporterTest, TellsThatAllIsLoadedThoughItGoesAtOnce) {
  auto reporter = std::make_optional<LoadReporter>(Place(), kOften);
  reporter->Set(1, 1000);
  Serve();
  std::thread goes([&] {
    reporter->Set(1000, 1000);
    reporter.reset();
  });
  uint64_t done_bytes = 0;
  for (int i = 0; i < 3 && done_bytes < 1000; ++i) done_bytes = Serve().done_bytes();
  goes.join();
  EXPECT_EQ(done_bytes, 1000u);
}

TEST_F(LoadReporterTest, ALoadThatIsShortIsSilent) {
  {
    LoadReporter reporter(Place(), std::chrono::hours(1));
    reporter.Set(0, 1000);
    reporter.Set(1000, 1000);
  }
  EXPECT_FALSE(SomebodyCalls(milliseconds(0)));
}

TEST_F(LoadReporterTest, ALauncherThatDoesNotAnswerOrIsGoneHoldsUpNobodyForLong) {
  for (const bool is_there : {true, false}) {
    if (!is_there) listener_.Reset();
    auto reporter = std::make_optional<LoadReporter>(Place(), milliseconds(1));
    reporter->Set(1, 1000);
    std::this_thread::sleep_for(milliseconds(50));  // a report is under way
    const auto begin = std::chrono::steady_clock::now();
    reporter.reset();
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
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
