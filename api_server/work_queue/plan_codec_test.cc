#include "api_server/work_queue/plan_codec.h"

#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <random>

#include "api_server/work_queue/message_codec.h"
#include "proto/work_queue.pb.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<BlockId> RandomBlocks(std::mt19937* rng) {
  std::vector<BlockId> blocks((*rng)() % 5);
  for (BlockId& block : blocks) block = static_cast<BlockId>((*rng)() % 100'000);
  return blocks;
}

std::vector<int32_t> RandomTokens(std::mt19937* rng) {
  std::vector<int32_t> tokens((*rng)() % 5);
  for (int32_t& token : tokens) token = static_cast<int32_t>((*rng)() % 100'000);
  return tokens;
}

StepPlan RandomPlan(std::mt19937* rng) {
  StepPlan plan{.group_epoch = (*rng)(), .pool_epoch = (*rng)(), .step = 1 + (*rng)() % 1000};
  plan.previous_plan_hash = (uint64_t{(*rng)()} << 32) | (*rng)();
  for (uint32_t i = 0; i < (*rng)() % 4; ++i) {
    SamplingParams sampling{.temperature = ((*rng)() % 20) / 10.0f,
                            .top_p = (1 + (*rng)() % 10) / 10.0f,
                            .top_k = static_cast<int32_t>((*rng)() % 50),
                            .seed = static_cast<int64_t>((*rng)()) * ((*rng)() % 2 ? 1 : -1),
                            .choice_index = static_cast<uint32_t>((*rng)() % 4),
                            .first_stop_position = static_cast<uint32_t>((*rng)() % 5000),
                            .min_p = ((*rng)() % 11) / 10.0f,
                            .repetition_penalty = (1 + (*rng)() % 20) / 10.0f,
                            .presence_penalty = ((*rng)() % 5) - 2.0f,
                            .frequency_penalty = ((*rng)() % 9) / 2.0f - 2.0f,
                            .num_top_logprobs = static_cast<int32_t>((*rng)() % 22) - 1,
                            .num_prompt_top_logprobs = static_cast<int32_t>((*rng)() % 22) - 1};
    for (int32_t token = 0; token < 300; ++token) {
      const float bias = static_cast<float>((*rng)() % 201) - 100.0f;
      if ((*rng)() % 50 != 0) continue;
      sampling.logit_biases.push_back({token, bias == 0 ? TokenBias::kBanned : bias});
    }
    plan.slot_init.push_back({static_cast<uint32_t>((*rng)() % 64), sampling, RandomBlocks(rng),
                              RandomTokens(rng), RandomTokens(rng)});
  }
  for (uint32_t i = 0; i < (*rng)() % 3; ++i) {
    plan.block_append.push_back({static_cast<uint32_t>((*rng)() % 64), RandomBlocks(rng)});
  }
  for (uint32_t i = 0; i < (*rng)() % 6; ++i) {
    PlanRow row{.slot = static_cast<uint32_t>((*rng)() % 64),
                .position = static_cast<uint32_t>((*rng)() % 5000),
                .length = 1,
                .sample = (*rng)() % 2 == 0,
                .tokens = {}};
    if ((*rng)() % 2 == 0) {
      row.tokens.resize(1 + (*rng)() % 200);
      for (int32_t& token : row.tokens) token = static_cast<int32_t>((*rng)() % 100'000);
      row.length = static_cast<uint32_t>(row.tokens.size());
      row.prompt_logprobs = (*rng)() % 2 == 0 && row.length > 1;
      if (row.prompt_logprobs && !row.sample) {
        row.next_token = static_cast<int32_t>((*rng)() % 100'000);
      }
    }
    plan.rows.push_back(row);
  }
  for (uint32_t i = 0; i < (*rng)() % 3; ++i) plan.slot_release.push_back((*rng)() % 64);
  for (uint32_t i = 0; i < (*rng)() % 4; ++i) {
    plan.copies.push_back({.to_device = (*rng)() % 2 == 0,
                           .block = static_cast<BlockId>((*rng)() % 100'000),
                           .host_slot = static_cast<uint32_t>((*rng)() % 100'000)});
  }
  return plan;
}

// Field by field, since a comparison of encodings would miss a field that the codec forgets.
void ExpectEqual(const StepPlan& a, const StepPlan& b) {
  EXPECT_EQ(a.group_epoch, b.group_epoch);
  EXPECT_EQ(a.pool_epoch, b.pool_epoch);
  EXPECT_EQ(a.step, b.step);
  EXPECT_EQ(a.previous_plan_hash, b.previous_plan_hash);
  EXPECT_EQ(a.slot_release, b.slot_release);
  ASSERT_EQ(a.slot_init.size(), b.slot_init.size());
  for (size_t i = 0; i < a.slot_init.size(); ++i) {
    EXPECT_EQ(a.slot_init[i].slot, b.slot_init[i].slot);
    EXPECT_EQ(a.slot_init[i].block_table, b.slot_init[i].block_table);
    EXPECT_EQ(a.slot_init[i].sampling.temperature, b.slot_init[i].sampling.temperature);
    EXPECT_EQ(a.slot_init[i].sampling.top_p, b.slot_init[i].sampling.top_p);
    EXPECT_EQ(a.slot_init[i].sampling.top_k, b.slot_init[i].sampling.top_k);
    EXPECT_EQ(a.slot_init[i].sampling.seed, b.slot_init[i].sampling.seed);
    EXPECT_EQ(a.slot_init[i].sampling.choice_index, b.slot_init[i].sampling.choice_index);
    EXPECT_EQ(a.slot_init[i].sampling.first_stop_position,
              b.slot_init[i].sampling.first_stop_position);
    EXPECT_EQ(a.slot_init[i].sampling.min_p, b.slot_init[i].sampling.min_p);
    EXPECT_EQ(a.slot_init[i].sampling.repetition_penalty,
              b.slot_init[i].sampling.repetition_penalty);
    EXPECT_EQ(a.slot_init[i].sampling.presence_penalty, b.slot_init[i].sampling.presence_penalty);
    EXPECT_EQ(a.slot_init[i].sampling.frequency_penalty, b.slot_init[i].sampling.frequency_penalty);
    EXPECT_EQ(a.slot_init[i].sampling.logit_biases, b.slot_init[i].sampling.logit_biases);
    EXPECT_EQ(a.slot_init[i].sampling.num_top_logprobs, b.slot_init[i].sampling.num_top_logprobs);
    EXPECT_EQ(a.slot_init[i].sampling.num_prompt_top_logprobs,
              b.slot_init[i].sampling.num_prompt_top_logprobs);
    EXPECT_EQ(a.slot_init[i].prompt_tokens, b.slot_init[i].prompt_tokens);
    EXPECT_EQ(a.slot_init[i].generated_tokens, b.slot_init[i].generated_tokens);
  }
  ASSERT_EQ(a.block_append.size(), b.block_append.size());
  for (size_t i = 0; i < a.block_append.size(); ++i) {
    EXPECT_EQ(a.block_append[i].slot, b.block_append[i].slot);
    EXPECT_EQ(a.block_append[i].blocks, b.block_append[i].blocks);
  }
  ASSERT_EQ(a.rows.size(), b.rows.size());
  for (size_t i = 0; i < a.rows.size(); ++i) {
    EXPECT_EQ(a.rows[i].slot, b.rows[i].slot);
    EXPECT_EQ(a.rows[i].position, b.rows[i].position);
    EXPECT_EQ(a.rows[i].length, b.rows[i].length);
    EXPECT_EQ(a.rows[i].sample, b.rows[i].sample);
    EXPECT_EQ(a.rows[i].tokens, b.rows[i].tokens);
    EXPECT_EQ(a.rows[i].prompt_logprobs, b.rows[i].prompt_logprobs);
    EXPECT_EQ(a.rows[i].next_token, b.rows[i].next_token);
  }
  ASSERT_EQ(a.copies.size(), b.copies.size());
  for (size_t i = 0; i < a.copies.size(); ++i) {
    EXPECT_EQ(a.copies[i].to_device, b.copies[i].to_device);
    EXPECT_EQ(a.copies[i].block, b.copies[i].block);
    EXPECT_EQ(a.copies[i].host_slot, b.copies[i].host_slot);
  }
}

TEST(PlanCodec, DecodingAnEncodedPlanGivesThePlan) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed={}", seed));
  std::mt19937 rng(seed);
  for (int i = 0; i < 2000; ++i) {
    const StepPlan plan = RandomPlan(&rng);
    const absl::StatusOr<StepPlan> decoded = DecodePlan(EncodePlan(plan));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    ExpectEqual(plan, *decoded);
    const EncodedPlan message = EncodePlanMessage(plan);
    const absl::StatusOr<ServerEvent> event = DecodeServerMessage(message.message);
    ASSERT_TRUE(event.ok()) << event.status();
    ASSERT_TRUE(std::holds_alternative<ReceivedPlan>(*event));
    ExpectEqual(plan, std::get<ReceivedPlan>(*event).plan);
    EXPECT_EQ(std::get<ReceivedPlan>(*event).plan_hash, message.plan_hash);
  }
}

TEST(PlanCodec, ThePlanMessageIsWhatProtobufWouldWrite) {
  std::mt19937 rng(7);
  for (int i = 0; i < 100; ++i) {
    const EncodedPlan encoded = EncodePlanMessage(RandomPlan(&rng));
    proto::ServerMessage message;
    ASSERT_TRUE(message.ParseFromString(encoded.message));
    ASSERT_TRUE(message.has_plan());
    EXPECT_EQ(PlanHash(message.plan().SerializeAsString()), encoded.plan_hash);
  }
}

TEST(PlanCodec, RandomAndTruncatedBytesNeverCrash) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed={}", seed));
  std::mt19937 rng(seed);
  for (int i = 0; i < 5000; ++i) {
    std::string bytes = EncodePlanMessage(RandomPlan(&rng)).message;
    if (rng() % 2 == 0) bytes.resize(rng() % (bytes.size() + 1));
    for (uint32_t j = 0; j < rng() % 8 && !bytes.empty(); ++j) {
      bytes[rng() % bytes.size()] = static_cast<char>(rng());
    }
    (void)DecodeServerMessage(bytes);
    (void)DecodeWorkerMessage(bytes);
    (void)DecodePlan(bytes);
  }
}

TEST(PlanCodec, DecodesEveryOtherMessageOfTheProtocol) {
  const auto configure =
      DecodeServerMessage(EncodeServerMessage(ConfigureWorker{1, 2, 3, 4, 5, 6, {9, 2}}));
  ASSERT_TRUE(configure.ok());
  EXPECT_EQ(std::get<ConfigureWorker>(*configure).sampled_vocab_size, 6u);
  EXPECT_THAT(std::get<ConfigureWorker>(*configure).stop_ids, ElementsAre(9, 2));
  const auto attach = DecodeServerMessage(EncodeServerMessage(AttachPool{7, "/run/m.sock", 8, 9}));
  ASSERT_TRUE(attach.ok());
  EXPECT_EQ(std::get<AttachPool>(*attach).memory_socket, "/run/m.sock");
  EXPECT_EQ(std::get<AttachPool>(*attach).num_blocks, 8u);
  EXPECT_EQ(std::get<AttachPool>(*attach).num_host_slots, 9u);
  const auto detach = DecodeServerMessage(EncodeServerMessage(DetachPool{7}));
  ASSERT_TRUE(detach.ok());
  EXPECT_EQ(std::get<DetachPool>(*detach).pool_epoch, 7u);
  const auto shutdown = DecodeServerMessage(EncodeServerMessage(ShutdownWorker{}));
  ASSERT_TRUE(shutdown.ok());
  EXPECT_TRUE(std::holds_alternative<ShutdownWorker>(*shutdown));

  const auto detached = DecodeWorkerMessage(EncodeWorkerMessage(PoolDetachedMessage{7}));
  ASSERT_TRUE(detached.ok());
  EXPECT_EQ(std::get<PoolDetachedMessage>(*detached).pool_epoch, 7u);
  const auto done = DecodeWorkerMessage(EncodeWorkerMessage(StepDone{
      1, 2, 3, 4, {{5, 6}, {7, 8, PositionLogprobs{-0.5f, 3, {{9, -0.25f}, {8, -0.5f}}}}}, 9}));
  ASSERT_TRUE(done.ok());
  EXPECT_EQ(std::get<StepDone>(*done).sampled[1].token, 8);
  EXPECT_EQ(std::get<StepDone>(*done).sampled[0].logprobs, std::nullopt);
  EXPECT_EQ(std::get<StepDone>(*done).sampled[1].logprobs,
            (PositionLogprobs{-0.5f, 3, {{9, -0.25f}, {8, -0.5f}}}));
  EXPECT_EQ(std::get<StepDone>(*done).sampled_digest, 9u);
  const std::vector<PromptRowLogprobs> prompt = {
      {3, 1, {{-0.5f, 3, {{9, -0.25f}, {8, -0.5f}}}, {-1.5f, 1, {{7, -1.5f}, {6, -2}}}}},
      {1, 70, {{-std::numeric_limits<float>::infinity(), 1001, {}}}}};
  const auto prompt_done = DecodeWorkerMessage(
      EncodeWorkerMessage(StepDone{.step = 2, .sampled = {{5, 6}}, .prompt_logprobs = prompt}));
  ASSERT_TRUE(prompt_done.ok()) << prompt_done.status();
  const auto& prompt_read = std::get<StepDone>(*prompt_done).prompt_logprobs;
  ASSERT_EQ(prompt_read.size(), 2u);
  for (size_t i = 0; i < prompt.size(); ++i) {
    EXPECT_EQ(prompt_read[i].slot, prompt[i].slot);
    EXPECT_EQ(prompt_read[i].position, prompt[i].position);
    EXPECT_EQ(prompt_read[i].tokens, prompt[i].tokens);
  }
  const auto fault =
      DecodeWorkerMessage(EncodeWorkerMessage(FaultMessage{FaultKind::kOutOfMemory, "x"}));
  ASSERT_TRUE(fault.ok());
  EXPECT_EQ(std::get<FaultMessage>(*fault).kind, FaultKind::kOutOfMemory);
  EXPECT_FALSE(std::get<FaultMessage>(*fault).kv_trusted);
}

struct BadPlan {
  const char* name;
  std::function<void(proto::StepPlan*)> spoil;
  const char* error;
};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

proto::Sampling* SamplingOf(proto::StepPlan* plan) {
  return plan->mutable_slot_init(0)->mutable_sampling();
}

class BadPlanTest : public testing::TestWithParam<BadPlan> {};

TEST_P(BadPlanTest, IsRefusedByTheNameOfTheField) {
  // Row 0 brings two tokens, row 1 takes its token from the slot, row 2 asks for what follows its
  // two tokens.
  const StepPlan good{
      .step = 1,
      .slot_init =
          {{0, {.logit_biases = {{4, -1}, {6, TokenBias::kBanned}}}, {BlockId{1}}, {10}, {11}}},
      .block_append = {{1, {BlockId{2}}}},
      .rows = {{0, 0, 2, true, {10, 11}},
               {1, 5, 1, true, {}},
               {2, 0, 2, false, {12, 13}, /*prompt_logprobs=*/true, /*next_token=*/14}},
      .copies = {{.to_device = true, .block = BlockId{3}, .host_slot = 4}}};
  proto::StepPlan plan;
  ASSERT_TRUE(plan.ParseFromString(EncodePlan(good)));
  ASSERT_TRUE(DecodePlan(plan.SerializeAsString()).ok());
  GetParam().spoil(&plan);
  const absl::StatusOr<StepPlan> decoded = DecodePlan(plan.SerializeAsString());
  EXPECT_EQ(decoded.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(decoded.status().message()), HasSubstr(GetParam().error));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadPlanTest,
    testing::Values(
        BadPlan{"StepZero", [](auto* p) { p->set_step(0); }, "step is 0"},
        BadPlan{"PositionColumnShort", [](auto* p) { p->mutable_row_position()->RemoveLast(); },
                "row_position has 2 entries, row_slot has 3"},
        BadPlan{"LengthColumnLong", [](auto* p) { p->add_row_length(1); },
                "row_length has 4 entries, row_slot has 3"},
        BadPlan{"FlagsColumnShort", [](auto* p) { p->mutable_row_flags()->pop_back(); },
                "row_flags has 2 entries, row_slot has 3"},
        BadPlan{"UnknownFlag", [](auto* p) { (*p->mutable_row_flags())[1] = 0x42; },
                "row_flags[1] is 0x42"},
        BadPlan{"EmptyRow", [](auto* p) { p->set_row_length(1, 0); }, "row_length[1] is 0"},
        BadPlan{"TwoTokensFromTheSlot", [](auto* p) { p->set_row_length(1, 2); },
                "row_length[1] is 2, must be 1"},
        BadPlan{"PositionOverflow", [](auto* p) { p->set_row_position(0, 0xffffffffu); },
                "row_position[0] is 4294967295"},
        BadPlan{"HugeRowLength", [](auto* p) { p->set_row_length(0, 0x7ffffffeu); },
                "tokens has 4 entries, too few for row 0"},
        BadPlan{"TokensLeftOver", [](auto* p) { p->add_tokens(3); },
                "tokens has 5 entries, the rows take 4"},
        BadPlan{"NextTokenMissing", [](auto* p) { p->clear_next_token(); },
                "next_token has 0 entries, too few for row 2"},
        BadPlan{"NextTokenLeftOver", [](auto* p) { p->add_next_token(3); },
                "next_token has 2 entries, the rows take 1"},
        BadPlan{"HugeNextToken", [](auto* p) { p->set_next_token(0, 0x80000000u); },
                "next_token holds 2147483648"},
        BadPlan{"NothingFollows",
                [](auto* p) {
                  p->set_row_length(2, 1);
                  p->mutable_tokens()->RemoveLast();
                  (*p->mutable_row_flags())[2] =
                      proto::ROW_FLAG_PROMPT_LOGPROBS | proto::ROW_FLAG_SAMPLE;
                },
                "row_flags[2] asks for log-probabilities of a prompt, but no token follows"},
        BadPlan{"PromptLogprobsOfATokenFromTheSlot",
                [](auto* p) {
                  (*p->mutable_row_flags())[1] =
                      proto::ROW_FLAG_PROMPT_LOGPROBS | proto::ROW_FLAG_TOKEN_FROM_SLOT;
                },
                "row_flags[1] is 0x6: a token from the slot is none of a prompt"},
        BadPlan{"HugeToken", [](auto* p) { p->set_tokens(0, 0x80000000u); },
                "tokens holds 2147483648"},
        BadPlan{"HugeTableBlock",
                [](auto* p) { p->mutable_slot_init(0)->set_block_table(0, 0x80000000u); },
                "slot_init.block_table holds block 2147483648"},
        BadPlan{"HugeAppendedBlock",
                [](auto* p) { p->mutable_block_append(0)->set_blocks(0, 0x80000000u); },
                "block_append.blocks holds block 2147483648"},
        BadPlan{"HugeCopiedBlock", [](auto* p) { p->mutable_copies(0)->set_block(0x80000000u); },
                "copies holds block 2147483648"},
        BadPlan{"NegativeTemperature",
                [](auto* p) { p->mutable_slot_init(0)->mutable_sampling()->set_temperature(-1); },
                "temperature is -1"},
        BadPlan{"TemperatureNotANumber",
                [](auto* p) {
                  p->mutable_slot_init(0)->mutable_sampling()->set_temperature(
                      std::numeric_limits<float>::quiet_NaN());
                },
                "temperature is nan"},
        BadPlan{"TopPZero",
                [](auto* p) { p->mutable_slot_init(0)->mutable_sampling()->set_top_p(0); },
                "top_p is 0"},
        BadPlan{"TopKHuge",
                [](auto* p) { p->mutable_slot_init(0)->mutable_sampling()->set_top_k(1u << 31); },
                "top_k is 2147483648"},
        BadPlan{"MinPAboveOne", [](auto* p) { SamplingOf(p)->set_min_p(1.5f); }, "min_p is 1.5"},
        BadPlan{"MinPNotANumber", [](auto* p) { SamplingOf(p)->set_min_p(kNan); }, "min_p is nan"},
        BadPlan{"RepetitionZero", [](auto* p) { SamplingOf(p)->set_repetition_penalty(0); },
                "repetition_penalty is 0"},
        BadPlan{"PresenceTooLarge", [](auto* p) { SamplingOf(p)->set_presence_penalty(2.5f); },
                "presence_penalty is 2.5, must be from -2 to 2"},
        BadPlan{"FrequencyNotANumber", [](auto* p) { SamplingOf(p)->set_frequency_penalty(kNan); },
                "frequency_penalty is nan"},
        BadPlan{"TopLogprobsHuge", [](auto* p) { SamplingOf(p)->set_num_top_logprobs(1u << 31); },
                "num_top_logprobs is 2147483648"},
        BadPlan{"PromptTopLogprobsHuge",
                [](auto* p) { SamplingOf(p)->set_num_prompt_top_logprobs(1u << 31); },
                "num_prompt_top_logprobs is 2147483648"},
        BadPlan{"BiasColumnShort", [](auto* p) { SamplingOf(p)->mutable_bias()->RemoveLast(); },
                "bias has 1 entries, bias_token has 2"},
        BadPlan{"BiasTooLarge", [](auto* p) { SamplingOf(p)->set_bias(0, 101); },
                "bias of token 4 is 101, must be from -100 to 100"},
        BadPlan{"BiasNotANumber", [](auto* p) { SamplingOf(p)->set_bias(0, kNan); },
                "bias of token 4 is nan"},
        BadPlan{"BiasTokensFall", [](auto* p) { SamplingOf(p)->set_bias_token(1, 4); },
                "bias_token holds 4 after 4, must rise"},
        BadPlan{"HugeBiasToken", [](auto* p) { SamplingOf(p)->set_bias_token(1, 1u << 31); },
                "bias_token holds 2147483648"},
        BadPlan{"HugePromptToken",
                [](auto* p) { p->mutable_slot_init(0)->set_prompt_tokens(0, 1u << 31); },
                "slot_init.prompt_tokens holds 2147483648"},
        BadPlan{"HugeGeneratedToken",
                [](auto* p) { p->mutable_slot_init(0)->set_generated_tokens(0, 1u << 31); },
                "slot_init.generated_tokens holds 2147483648"}),
    [](const auto& info) { return info.param.name; });

TEST(PlanCodec, RefusesAResultWithUnequalColumns) {
  proto::WorkerMessage message;
  message.mutable_step_done()->mutable_result()->add_slot(1);
  const auto decoded = DecodeWorkerMessage(message.SerializeAsString());
  EXPECT_EQ(decoded.status().message(),
            "WorkerMessage: step_done.result.token has 0 entries, slot has 1");
}

TEST(PlanCodec, RefusesLogprobsThatFitNoEntryOrNotEachOther) {
  proto::WorkerMessage message;
  proto::StepResult* result = message.mutable_step_done()->mutable_result();
  result->add_slot(1);
  result->add_token(2);
  result->add_logprobs()->set_entry(1);
  EXPECT_EQ(DecodeWorkerMessage(message.SerializeAsString()).status().message(),
            "WorkerMessage: step_done.result.logprobs.entry is 1, of 1 entries");
  result->mutable_logprobs(0)->set_entry(0);
  result->mutable_logprobs(0)->add_top_token(5);
  EXPECT_EQ(DecodeWorkerMessage(message.SerializeAsString()).status().message(),
            "WorkerMessage: step_done.result.logprobs.top_logprob has 0 entries, top_token has 1");
  result->mutable_logprobs(0)->add_top_logprob(-1);
  EXPECT_TRUE(DecodeWorkerMessage(message.SerializeAsString()).ok());
}

TEST(PlanCodec, RefusesPromptLogprobsThatDoNotFitEachOther) {
  proto::WorkerMessage message;
  proto::PromptLogprobs* logprobs =
      message.mutable_step_done()->mutable_result()->add_prompt_logprobs();
  const auto error = [&] {
    return std::string(DecodeWorkerMessage(message.SerializeAsString()).status().message());
  };
  const std::string place = "WorkerMessage: step_done.result.prompt_logprobs.";
  EXPECT_EQ(error(), place + "logprob is empty");
  logprobs->add_logprob(-1);
  logprobs->add_logprob(-2);
  logprobs->add_rank(1);
  EXPECT_EQ(error(), place + "rank has 1 entries, logprob has 2");
  logprobs->add_rank(0x80000000u);
  EXPECT_EQ(error(), place + "rank holds 2147483648, above the largest 2147483647");
  logprobs->set_rank(1, 2);
  for (const uint32_t token : {5u, 6u, 7u}) logprobs->add_top_token(token);
  EXPECT_EQ(error(), place + "top_token has 3 entries, not as many for each of 2 tokens");
  logprobs->add_top_token(0x80000000u);
  EXPECT_EQ(error(), place + "top_logprob has 0 entries, top_token has 4");
  for (int i = 0; i < 4; ++i) logprobs->add_top_logprob(-1);
  EXPECT_EQ(error(), place + "top_token holds 2147483648, above the largest 2147483647");
  logprobs->set_top_token(3, 8);
  EXPECT_TRUE(DecodeWorkerMessage(message.SerializeAsString()).ok());
}

TEST(PlanCodec, RefusesIdsThatAreNoTokens) {
  proto::ServerMessage configure;
  configure.mutable_configure()->add_stop_ids(2);
  configure.mutable_configure()->add_stop_ids(0x80000000u);
  EXPECT_EQ(DecodeServerMessage(configure.SerializeAsString()).status().message(),
            "ServerMessage: configure.stop_ids holds 2147483648, above the largest id 2147483647");
  proto::WorkerMessage done;
  done.mutable_step_done()->mutable_result()->add_slot(1);
  done.mutable_step_done()->mutable_result()->add_token(0xffffffffu);
  EXPECT_EQ(DecodeWorkerMessage(done.SerializeAsString()).status().message(),
            "WorkerMessage: step_done.result.token holds 4294967295, above the largest id "
            "2147483647");
}

TEST(PlanCodec, ADecodePlanOf64RowsIsBelow1KiBEvenWhenEveryRowGetsABlock) {
  StepPlan plan{
      .group_epoch = ~0ull, .pool_epoch = ~0ull, .step = 1ull << 40, .previous_plan_hash = ~0ull};
  for (uint32_t slot = 0; slot < 64; ++slot) {
    plan.rows.push_back({slot, 131'000 + slot, 1, true, {}});
  }
  EXPECT_LT(EncodePlanMessage(plan).message.size(), 512u);
  for (uint32_t slot = 0; slot < 64; ++slot) {
    plan.block_append.push_back({slot, {static_cast<BlockId>(100'000 + slot)}});
  }
  EXPECT_LT(EncodePlanMessage(plan).message.size(), 1024u);
}

TEST(PlanCodec, AnAbortNamesTheEpochOfAGroup) {
  const auto abort = DecodeServerMessage(EncodeServerMessage(AbortGroup{~0ull, "rank 1 is gone"}));
  ASSERT_TRUE(abort.ok()) << abort.status();
  EXPECT_EQ(std::get<AbortGroup>(*abort).group_epoch, ~0ull);
  EXPECT_EQ(std::get<AbortGroup>(*abort).reason, "rank 1 is gone");
  const auto aborted = DecodeWorkerMessage(EncodeWorkerMessage(AbortedMessage{~0ull}));
  ASSERT_TRUE(aborted.ok()) << aborted.status();
  EXPECT_EQ(std::get<AbortedMessage>(*aborted).group_epoch, ~0ull);

  EXPECT_EQ(DecodeServerMessage(EncodeServerMessage(AbortGroup{0, "x"})).status().message(),
            "ServerMessage: abort_group.group_epoch is 0, no group has that");
  EXPECT_EQ(DecodeWorkerMessage(EncodeWorkerMessage(AbortedMessage{0})).status().message(),
            "WorkerMessage: aborted.group_epoch is 0, no group has that");
}

TEST(PlanCodec, AHelloNamesThePoolThatIsMappedStill) {
  const auto hello =
      DecodeWorkerMessage(EncodeWorkerMessage(HelloMessage{.hello = {.mapped_pool_epoch = ~0ull}}));
  ASSERT_TRUE(hello.ok()) << hello.status();
  EXPECT_EQ(std::get<HelloMessage>(*hello).hello.mapped_pool_epoch, ~0ull);
}

TEST(PlanCodec, RefusesAnUnknownFaultKindAndAnEmptyMessage) {
  proto::WorkerMessage message;
  message.mutable_fault()->set_kind(static_cast<proto::Fault::Kind>(77));
  EXPECT_EQ(DecodeWorkerMessage(message.SerializeAsString()).status().message(),
            "WorkerMessage: fault.kind is 77, unknown");
  EXPECT_EQ(DecodeWorkerMessage("").status().message(),
            "WorkerMessage: no field that this build knows");
  EXPECT_EQ(DecodeServerMessage("").status().message(),
            "ServerMessage: no field that this build knows");
}

TEST(PlanCodec, HashAndDigestDependOnEveryByteAndAreNeverTakenForAbsent) {
  EXPECT_NE(PlanHash("a"), PlanHash("b"));
  const std::vector<int32_t> ids = {1, 2};
  const std::vector<int32_t> swapped = {2, 1};
  EXPECT_NE(SampledDigest(ids), SampledDigest(swapped));
  EXPECT_NE(SampledDigest({}), 0u);
}

}  // namespace
}  // namespace wintserve
