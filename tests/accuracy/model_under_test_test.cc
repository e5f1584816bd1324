// What the accuracy programs run, on the CPU: a comparison is worth what its two sides are.
#include "tests/accuracy/model_under_test.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "common/check.h"

namespace wintserve::accuracy {
namespace {

constexpr int32_t kStopId = 2;

const nlohmann::json& Golden() {
  static const auto* golden = [] {
    std::ifstream file("tests/golden/poet-wint2.json");
    CHECK(file.good());
    return new nlohmann::json(nlohmann::json::parse(file));
  }();
  return *golden;
}

std::unique_ptr<ModelUnderTest> Poet(
    kernels::WeightRounding rounding = kernels::WeightRounding::kFastDeploy) {
  auto model = ModelUnderTest::Load(
      {.model_dir = "models/poet", .device = "cpu", .rounding = rounding, .num_threads = 2});
  CHECK(model.ok(), "{}", model.status().ToString());
  return *std::move(model);
}

TEST(ModelUnderTest, GreedyTextIsThatOfTheGoldensThoughAllPromptsRunTogether) {
  std::vector<GreedyRequest> requests;
  std::vector<TokenIds> expected;
  for (const auto& golden : Golden()["cases"]) {
    requests.push_back({golden["ids"], golden["greedy"]["max_tokens"]});
    expected.push_back(golden["greedy"]["ids"]);
  }
  const auto greedy = Poet()->Greedy(requests, kStopId);
  ASSERT_TRUE(greedy.ok()) << greedy.status();
  EXPECT_EQ(*greedy, expected);
}

TEST(ModelUnderTest, TwoRanksGiveTheTextOfOne) {
  std::vector<GreedyRequest> requests;
  std::vector<TokenIds> expected;
  for (const auto& golden : Golden()["cases"]) {
    requests.push_back({golden["ids"], 8});
    const TokenIds ids = golden["greedy"]["ids"];
    expected.emplace_back(ids.begin(), ids.begin() + std::min<int64_t>(8, std::ssize(ids)));
  }
  const auto meeting_place = std::make_shared<MeetingPlace>(2);
  const auto run = [&](int rank) {
    auto model = ModelUnderTest::Load({.model_dir = "models/poet",
                                       .device = "cpu",
                                       .rounding = kernels::WeightRounding::kFastDeploy,
                                       .rank = rank,
                                       .meeting_place = meeting_place});
    CHECK(model.ok(), "{}", model.status().ToString());
    int num_logits = 0;
    const auto forced = (*model)->TeacherForce(
        {requests[0].prompt}, [&](size_t, size_t, std::span<const float>) { ++num_logits; });
    ASSERT_TRUE(forced.ok()) << forced.status();
    EXPECT_EQ(*forced, rank == 0 ? 1 : 0);
    EXPECT_EQ(num_logits, rank == 0 ? std::ssize(requests[0].prompt) : 0);
    const auto greedy = (*model)->Greedy(requests, kStopId);
    ASSERT_TRUE(greedy.ok()) << greedy.status();
    EXPECT_EQ(*greedy, expected) << "rank " << rank;
  };
  std::thread other([&] { run(1); });
  run(0);
  other.join();
}

TEST(ModelUnderTest, EveryPositionIsForcedOnceAndLastOnesAreThoseOfTheGoldens) {
  const double tolerance = Golden()["tolerance"]["float32_activations_abs"];
  std::vector<TokenIds> sequences;
  for (const auto& golden : Golden()["cases"]) sequences.push_back(golden["ids"]);
  std::vector<std::vector<int>> visits;
  for (const TokenIds& ids : sequences) visits.emplace_back(ids.size());
  std::vector<std::vector<float>> last(sequences.size());
  const auto poet = Poet();
  const auto num_same = poet->TeacherForce(
      sequences, [&](size_t sequence, size_t position, std::span<const float> logits) {
        ++visits[sequence][position];
        ASSERT_EQ(std::ssize(logits), poet->vocab_size());
        if (position + 1 == sequences[sequence].size()) {
          last[sequence].assign(logits.begin(), logits.end());
        }
      });
  ASSERT_TRUE(num_same.ok()) << num_same.status();
  EXPECT_EQ(*num_same, std::ssize(sequences));
  for (size_t s = 0; s < sequences.size(); ++s) {
    SCOPED_TRACE(s);
    EXPECT_EQ(visits[s], std::vector<int>(sequences[s].size(), 1));
    const auto& golden = Golden()["cases"][s]["logits"].back();
    const std::vector<int32_t> ids = golden["top8_ids"];
    const std::vector<double> values = golden["top8"];
    for (size_t i = 0; i < ids.size(); ++i) {
      EXPECT_NEAR(last[s][ids[i]], values[i], tolerance) << "token " << ids[i];
    }
  }
}

TEST(ModelUnderTest, TheTwoRoundingsOfTheWeightsAreTwoModels) {
  const std::vector<TokenIds> sequences = {Golden()["cases"][0]["ids"]};
  const auto logits_of = [&](kernels::WeightRounding rounding) {
    std::vector<float> all;
    CHECK(Poet(rounding)
              ->TeacherForce(sequences,
                             [&](size_t, size_t, std::span<const float> logits) {
                               all.insert(all.end(), logits.begin(), logits.end());
                             })
              .ok());
    return all;
  };
  EXPECT_NE(logits_of(kernels::WeightRounding::kFastDeploy),
            logits_of(kernels::WeightRounding::kUnrounded));
}

TEST(ModelUnderTest, ADeviceThatTheBuildLacksIsNamed) {
  const auto model = ModelUnderTest::Load({.model_dir = "models/poet", .device = "tpu"});
  EXPECT_EQ(model.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(model.status().message().find("tpu"), std::string::npos);
}

}  // namespace
}  // namespace wintserve::accuracy
