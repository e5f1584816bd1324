#include "tools/eval/evaluate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include "tests/fakes/fake_tokenizer.h"
#include "tools/eval/fake_server_test_util.h"
#include "tools/eval/temporary_file_test_util.h"

namespace wintserve::eval {
namespace {

using testing::EndsWith;
using testing::HasSubstr;

std::string MessageOf(const absl::Status& status) { return std::string(status.message()); }

double NatsOf(const std::string& text) {
  double nats = 0;
  for (const char byte : text) nats -= FakeServer::LogprobOf(FakeTokenizer::IdOfByte(byte));
  return nats;
}

class Evaluation : public testing::Test {
 protected:
  absl::StatusOr<Report> Run() {
    options_.server = server_.endpoint().url;
    auto tasks = ReadTasks(options_, &tokenizer_);
    if (!tasks.ok()) return tasks.status();
    return Evaluate(options_, *tasks, server_.endpoint(), &stop_);
  }
  TaskResult RunOne(TaskKind kind, const std::string& file) {
    options_.tasks = {{kind, file, 0}};
    return Run().value().tasks.at(0);
  }

  FakeServer server_;
  FakeTokenizer tokenizer_;
  StopFlag stop_;
  Options options_;
};

TEST_F(Evaluation, OfChatsCountsTheAnswersAndTheEnd) {
  const TemporaryFile file(
      R"({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]})"
      "\n"
      R"({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "d"}]})"
      "\n");
  server_.SetModels({{"data", {{{"id", "poet"}}}}});  // of any length
  const TaskResult result = RunOne(TaskKind::kChatLoss, file.path());
  EXPECT_EQ(result.num_items, 2);
  EXPECT_EQ(result.num_tokens, 6);
  const double end = -FakeServer::LogprobOf(FakeTokenizer::kEos);
  const double nats_per_token = (NatsOf("abcd") + 2 * end) / 6;
  EXPECT_EQ(result.measures[0].name, "nats per answer token");
  EXPECT_NEAR(result.measures[0].estimate.value, nats_per_token, 1e-12);
  EXPECT_NEAR(result.measures[1].estimate.value, std::exp(nats_per_token), 1e-12);
  EXPECT_EQ(result.measures[2].name, "bits per byte");
  EXPECT_NEAR(result.measures[2].estimate.value, nats_per_token * 6 / 4 / std::numbers::ln2, 1e-12);
}

TEST_F(Evaluation, OfChoicesComparesSumsAndMeansPerByte) {
  // Nats of 'p' (id 212) are 0.5, of 'q' 0.625, of '`' (id 196) 0.5: the shorter choice wins by its
  // sum, the longer one by its mean.
  ASSERT_DOUBLE_EQ(NatsOf("qq"), 1.25);
  ASSERT_DOUBLE_EQ(NatsOf("ppp"), 1.5);
  const TemporaryFile file(R"({"prompt": "x", "choices": ["qq", "ppp"], "answer": 0})"
                           "\n"
                           R"({"prompt": "x", "choices": ["ppp", "qq"], "answer": 1})"
                           "\n"
                           R"({"prompt": "x", "choices": ["qq", "ppp"], "answer": 1})"
                           "\n");
  options_.raw = true;
  const TaskResult result = RunOne(TaskKind::kMultipleChoice, file.path());
  EXPECT_EQ(result.num_items, 3);
  EXPECT_EQ(result.measures[0].name, "accuracy");
  EXPECT_NEAR(result.measures[0].estimate.value, 2.0 / 3, 1e-12);
  EXPECT_EQ(result.measures[1].name, "accuracy, per byte");
  EXPECT_NEAR(result.measures[1].estimate.value, 1.0 / 3, 1e-12);
}

TEST_F(Evaluation, OfExactAnswersLooksForTheTextOrForNothingElse) {
  // The server says everything twice.
  const TemporaryFile file(R"({"prompt": "ab", "answer": "ba"})"
                           "\n"
                           R"({"prompt": "ab", "answer": ["x", "abab"]})"
                           "\n"
                           R"({"prompt": "ab", "answer": "aa"})"
                           "\n");
  EXPECT_NEAR(RunOne(TaskKind::kExact, file.path()).measures[0].estimate.value, 2.0 / 3, 1e-12);
  options_.exact_match = true;
  EXPECT_NEAR(RunOne(TaskKind::kExact, file.path()).measures[0].estimate.value, 1.0 / 3, 1e-12);
}

TEST_F(Evaluation, OfExactAnswersAloneAsksForNoLogprobs) {
  server_.SetCompletions([](const auto&) -> FakeReply { return {400, "{}", ""}; });
  const TemporaryFile file(R"({"prompt": "ab", "answer": "ba"})");
  EXPECT_EQ(RunOne(TaskKind::kExact, file.path()).num_items, 1);
}

TEST_F(Evaluation, DoesNotDependOnTheNumberOfRequestsAtATime) {
  std::string text;
  for (int i = 0; i < 500; ++i) text += static_cast<char>('a' + i * i % 26);
  const TemporaryFile file(text, ".txt");
  options_.context_tokens = 16;
  options_.concurrency = 1;
  const TaskResult one = RunOne(TaskKind::kPerplexity, file.path());
  options_.concurrency = 13;
  const TaskResult many = RunOne(TaskKind::kPerplexity, file.path());
  EXPECT_EQ(one.num_items, 32);
  EXPECT_EQ(one.measures[0].estimate.value, many.measures[0].estimate.value);
  EXPECT_EQ(one.measures[0].estimate.standard_error, many.measures[0].estimate.standard_error);
}

TEST_F(Evaluation, EndsWithTheFirstItemThatTheServerRefusesAndNamesIt) {
  const TemporaryFile file(R"({"prompt": "x", "choices": ["a", "b"], "answer": 0})"
                           "\n"
                           R"({"prompt": "y", "choices": ["a", "b"], "answer": 0})"
                           "\n");
  server_.SetCompletions([](const nlohmann::json& body) -> FakeReply {
    if (body["prompt"][0] == FakeTokenizer::IdOfByte('y')) {
      return {400, R"({"error": {"message": "not this one"}})", ""};
    }
    return {200, FakeServer::EchoAnswer(body).dump(), ""};
  });
  options_.raw = true;
  options_.tasks = {{TaskKind::kMultipleChoice, file.path(), 0}};
  const auto report = Run();
  EXPECT_EQ(report.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(MessageOf(report.status()), HasSubstr(file.path() + ":2: "));
  EXPECT_THAT(MessageOf(report.status()), EndsWith("HTTP 400: not this one"));
}

TEST_F(Evaluation, FindsABadLineBeforeAnythingIsAsked) {
  const TemporaryFile good(R"({"prompt": "ab", "answer": "ba"})");
  const TemporaryFile bad(R"({"prompt": "ab"})");
  options_.tasks = {{TaskKind::kExact, good.path(), 0}, {TaskKind::kExact, bad.path(), 0}};
  EXPECT_THAT(MessageOf(Run().status()), EndsWith(":1: answer: is missing"));
  EXPECT_EQ(server_.num_requests(), 0);
}

TEST_F(Evaluation, EndsWhenTheServerDies) {
  std::string lines;
  for (int i = 0; i < 64; ++i)
    lines += R"({"prompt": "x", "choices": ["a", "b"], "answer": 0})"
             "\n";
  const TemporaryFile file(lines);
  options_.tasks = {{TaskKind::kMultipleChoice, file.path(), 0}};
  options_.concurrency = 2;
  std::thread other([this] {
    while (server_.num_requests() < 8) std::this_thread::yield();
    server_.Stop();
  });
  const auto report = Run();
  other.join();
  EXPECT_EQ(report.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(MessageOf(report.status()), HasSubstr("no answer"));
}

}  // namespace
}  // namespace wintserve::eval
