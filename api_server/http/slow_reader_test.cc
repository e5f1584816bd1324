// Clients that do not read, or slowly: they hold up nobody, cost little and do not stay for ever.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "api_server/http/http_client_test_util.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using testing::HasSubstr;

constexpr char kStreaming[] = R"(,"stream":true)";
constexpr int kSmallBuffer = 4096;
// The kernel holds twice the server's send buffer of 128 KiB and a few KiB of the client's.
constexpr size_t kMoreThanTheKernelHolds = 4 << 20;
constexpr int kPieceBytes = 64 << 10;

// Fills the sockets of a client that reads nothing, and the server's buffer too.
void Flood(FakeLlm& llm, RequestHandle handle) {
  const std::string piece(kPieceBytes, 'a');
  for (size_t sent = 0; sent < kMoreThanTheKernelHolds; sent += piece.size()) {
    llm.Send(handle, TextUpdate(0, piece));
  }
}

TEST(SlowReader, IsCutAndItsRequestCancelledWhenItReadsNothing) {
  constexpr milliseconds kStallTimeout(300);
  HttpOptions options;
  options.client_stall_timeout = kStallTimeout;
  TestServer server(options);
  server.llm().HoldUpdates();
  RawClient client(server.port(), kSmallBuffer);
  client.Send(ChatPost(kStreaming));
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  const auto start = steady_clock::now();
  Flood(server.llm(), 1);
  EXPECT_TRUE(server.llm().WaitForCancelled(1));
  EXPECT_GE(steady_clock::now() - start, kStallTimeout);
  EXPECT_TRUE(server.http().WaitUntilIdle(std::chrono::seconds(10)));
  EXPECT_THAT(Fetch(server.port(), Get("/metrics")).body,
              HasSubstr("fastdeploy:request_aborted_total 1"));
}

// It takes a little now and then, so no write ever stands still; but it falls behind.
TEST(SlowReader, IsCutWhenItFallsBehindForTooLong) {
  HttpOptions options;
  options.client_stall_timeout = milliseconds(500);
  TestServer server(options);
  server.llm().HoldUpdates();
  RawClient client(server.port(), kSmallBuffer);
  client.Send(ChatPost(kStreaming));
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  Flood(server.llm(), 1);
  while (server.llm().cancelled().empty() && client.ReadSome()) {
    server.llm().Send(1, TextUpdate(0, std::string(kPieceBytes, 'a')));
    std::this_thread::sleep_for(milliseconds(5));
  }
  EXPECT_TRUE(server.llm().WaitForCancelled(1));
}

TEST(SlowReader, HoldsUpNobodyElse) {
  TestServer server;
  server.llm().HoldUpdates();
  // One on each IO thread, and one more.
  std::vector<std::unique_ptr<RawClient>> stuck;
  for (RequestHandle handle = 1; handle <= 3; ++handle) {
    stuck.push_back(std::make_unique<RawClient>(server.port(), kSmallBuffer));
    stuck.back()->Send(ChatPost(kStreaming));
    ASSERT_TRUE(server.llm().WaitForSubmitted(handle));
    Flood(server.llm(), handle);
  }
  for (RequestHandle handle = 4; handle <= 7; ++handle) {
    RawClient client(server.port());
    client.Send(ChatPost(kStreaming));
    ASSERT_TRUE(server.llm().WaitForSubmitted(handle));
    server.llm().Send(handle, TextUpdate(0, "first"));
    EXPECT_THAT(client.ReadUntil("first"), HasSubstr("first"));
    server.llm().Send(handle, TextUpdate(0, "last", FinishReason::kStop));
    EXPECT_THAT(client.ReadUntil("[DONE]"), HasSubstr("last"));
  }
  EXPECT_TRUE(server.llm().cancelled().empty()) << "the stuck ones have time left";
}

TEST(SlowReader, GetsEveryCharacterInFewEventsWhenItReadsAgain) {
  constexpr int kNumUpdates = 20'000;
  TestServer server;
  server.llm().HoldUpdates();
  RawClient client(server.port(), kSmallBuffer);
  client.Send(ChatPost(kStreaming));
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  Flood(server.llm(), 1);
  size_t expected_bytes = kMoreThanTheKernelHolds;
  const size_t num_before = server.llm().num_updates();
  std::string tail;
  for (int i = 0; i < kNumUpdates; ++i) {
    const std::string text = std::to_string(i) + " ";
    tail += text;
    server.llm().Send(1, TextUpdate(0, text));
  }
  expected_bytes += tail.size();
  server.llm().Send(1, TextUpdate(0, "", FinishReason::kStop));
  // All has reached the connection before the first byte is read.
  const auto patience = steady_clock::now() + std::chrono::seconds(10);
  while (server.llm().num_updates() < num_before + kNumUpdates && steady_clock::now() < patience) {
    std::this_thread::sleep_for(milliseconds(5));
  }

  const Response response = client.Receive().value_or(Response());
  EXPECT_EQ(response.status, 200);
  std::string text;
  int num_events = 0;
  for (size_t at = 0; (at = response.body.find("data: {", at)) != std::string::npos;) {
    at += 6;
    const auto event =
        nlohmann::json::parse(response.body.substr(at, response.body.find("\n\n", at) - at));
    text += event["choices"][0]["delta"].value("content", "");
    ++num_events;
  }
  EXPECT_EQ(text.size(), expected_bytes);
  EXPECT_TRUE(text.ends_with(tail));
  EXPECT_LT(num_events, kNumUpdates / 10);
  EXPECT_TRUE(server.llm().cancelled().empty());
}

// Slower than the stall timeout as a whole, but never without progress.
TEST(SlowReader, OfAWholeAnswerMayTakeItsTime) {
  constexpr milliseconds kStallTimeout(1500);  // a busy machine may stop us for a while
  HttpOptions options;
  options.client_stall_timeout = kStallTimeout;
  TestServer server(options);
  server.llm().SetPieces({std::string(8 * kMoreThanTheKernelHolds, 'a')});
  RawClient client(server.port(), kSmallBuffer);
  client.Send(ChatPost());
  const auto start = steady_clock::now();
  while (steady_clock::now() - start < 3 * kStallTimeout) {
    ASSERT_TRUE(client.ReadSome());
    std::this_thread::sleep_for(milliseconds(5));
  }
  const Response response = client.Receive().value_or(Response());
  EXPECT_EQ(response.status, 200);
  EXPECT_GT(response.body.size(), kMoreThanTheKernelHolds);
}

}  // namespace
}  // namespace wintserve
