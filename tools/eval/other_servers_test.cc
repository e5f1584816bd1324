// Answers of the servers that others write, in the forms that those give them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/fakes/fake_tokenizer.h"
#include "tools/eval/evaluate.h"
#include "tools/eval/fake_server_test_util.h"
#include "tools/eval/model_server.h"

namespace wintserve::eval {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int32_t kIds[] = {3, 20, 5};

std::string MessageOf(const absl::Status& status) { return std::string(status.message()); }

FakeReply Json(const json& body, int status = 200) { return {status, body.dump(), ""}; }

// vLLM's errors: a "code" and a "param" beside the message.
FakeReply VllmError(int status, const std::string& type, const std::string& message) {
  return Json(
      {{"error", {{"message", message}, {"type", type}, {"param", nullptr}, {"code", status}}}},
      status);
}

json VllmAnswer(const json& body, const json& logprobs, const json& prompt_logprobs) {
  const size_t num_prompt = body["prompt"].size();
  const int num_made = body["max_tokens"];
  return {{"id", "cmpl-1"},
          {"object", "text_completion"},
          {"model", body["model"]},
          {"choices",
           {{{"index", 0},
             {"text", "…"},
             {"logprobs", logprobs},
             {"finish_reason", "length"},
             {"stop_reason", nullptr},
             {"token_ids", nullptr},
             {"prompt_logprobs", prompt_logprobs},
             {"prompt_token_ids", nullptr}}}},
          {"usage",
           {{"prompt_tokens", num_prompt},
            {"total_tokens", num_prompt + num_made},
            {"completion_tokens", num_made},
            {"prompt_tokens_details", nullptr}}},
          {"kv_transfer_params", nullptr}};
}

// Of "echo" with "logprobs".
json VllmEchoAnswer(const json& body) {
  json tokens = json::array({"<s>"});
  json values = json::array({nullptr});
  json candidates = json::array({nullptr});
  json offsets = json::array({0});
  const auto add = [&](double value) {
    tokens.push_back("t");
    values.push_back(value);
    candidates.push_back({{"t", value}});
    offsets.push_back(offsets.size());
  };
  for (size_t i = 1; i < body["prompt"].size(); ++i) add(FakeServer::LogprobOf(body["prompt"][i]));
  for (int i = 0; i < body["max_tokens"]; ++i) add(-0.5);
  return VllmAnswer(body,
                    {{"text_offset", offsets},
                     {"token_logprobs", values},
                     {"tokens", tokens},
                     {"top_logprobs", candidates}},
                    nullptr);
}

// Of "prompt_logprobs": the prompt's own token and the likeliest one, which may be the same.
json VllmPromptAnswer(const json& body) {
  json positions = json::array({nullptr});
  for (size_t i = 1; i < body["prompt"].size(); ++i) {
    const int32_t id = body["prompt"][i];
    json position = {
        {std::to_string(id),
         {{"logprob", FakeServer::LogprobOf(id)}, {"rank", i}, {"decoded_token", "t"}}}};
    if (i > 1) position["7"] = {{"logprob", -0.01}, {"rank", 1}, {"decoded_token", "x"}};
    positions.push_back(position);
  }
  return VllmAnswer(body, nullptr, positions);
}

class OtherServers : public ::testing::Test {
 protected:
  HttpClient Client() { return HttpClient::Create(server_.endpoint(), &stop_).value(); }
  // Form and log-probabilities, as an evaluation finds and asks for them.
  absl::StatusOr<std::vector<double>> FindFormAndAsk() {
    HttpClient client = Client();
    const absl::Status status = FindPromptForm(client, &model_);
    if (!status.ok()) return status;
    return PromptLogprobs(client, model_, kIds);
  }
  void ExpectScored() {
    const auto logprobs = FindFormAndAsk();
    ASSERT_TRUE(logprobs.ok()) << logprobs.status();
    EXPECT_THAT(*logprobs, ElementsAre(0, FakeServer::LogprobOf(20), FakeServer::LogprobOf(5)));
  }

  FakeServer server_;
  StopFlag stop_;
  ServedModel model_{"poet", std::nullopt, std::nullopt};
};

TEST_F(OtherServers, VllmEchoesWithoutGenerating) {
  server_.SetCompletions([](const json& body) { return Json(VllmEchoAnswer(body)); });
  ExpectScored();
  EXPECT_EQ(model_.form->max_tokens, 0);
}

TEST_F(OtherServers, OlderVllmEchoesOnlyWithATokenOfItsOwn) {
  server_.SetCompletions([](const json& body) {
    if (body["max_tokens"] == 0) {
      return VllmError(400, "BadRequestError", "max_tokens must be at least 1, got 0.");
    }
    return Json(VllmEchoAnswer(body));
  });
  ExpectScored();
  EXPECT_EQ(model_.form->max_tokens, 1);
}

// Some versions want the text of a prompt for an echo, and have none of one in ids.
TEST_F(OtherServers, VllmThatFailsAtAnEchoOfIdsIsAskedByItsExtension) {
  server_.SetCompletions([](const json& body) {
    if (body.contains("echo")) return FakeReply{500, "Internal Server Error", ""};
    return Json(VllmPromptAnswer(body));
  });
  ExpectScored();
  EXPECT_EQ(model_.form->kind, PromptForm::Kind::kPromptLogprobs);
}

TEST_F(OtherServers, ATokenOfProbabilityZeroIsNamedAndNotAveraged) {
  for (const bool is_echo : {true, false}) {
    server_.SetCompletions([&](const json& body) {
      if (!is_echo && body.contains("echo")) return VllmError(400, "BadRequestError", "no");
      json answer = is_echo ? VllmEchoAnswer(body) : VllmPromptAnswer(body);
      json& choice = answer["choices"][0];
      if (body["prompt"].back() == 1) return Json(answer);  // the probe
      if (is_echo) {
        choice["logprobs"]["token_logprobs"][2] = -9999.0;
      } else {
        choice["prompt_logprobs"][2]["5"]["logprob"] = -9999.0;
      }
      return Json(answer);
    });
    const auto logprobs = FindFormAndAsk();
    EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kInternal);
    EXPECT_THAT(MessageOf(logprobs.status()),
                HasSubstr("-9999.0 as the log-probability of token 2 (id 5)"));
  }
}

TEST_F(OtherServers, VllmSaysWhatIsWrongWithIdsOfAnotherVocabulary) {
  server_.SetCompletions([](const json& body) {
    if (body["prompt"].back() == 1) return Json(VllmEchoAnswer(body));
    return VllmError(400, "BadRequestError", "Token id 103000 is out of vocabulary");
  });
  const auto logprobs = FindFormAndAsk();
  EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(MessageOf(logprobs.status()),
              HasSubstr("/v1/completions: HTTP 400: Token id 103000 is out of vocabulary"));
}

// llama.cpp refuses "echo", and takes "prompt_logprobs" for nothing that it knows.
TEST_F(OtherServers, LlamaCppIsSaidToScoreNoPrompt) {
  server_.SetCompletions([](const json& body) {
    if (body.contains("echo")) {
      return Json(
          {{"error",
            {{"code", 500}, {"message", "Only no echo is supported"}, {"type", "server_error"}}}},
          500);
    }
    return Json(
        {{"choices",
          {{{"text", "a"}, {"index", 0}, {"logprobs", nullptr}, {"finish_reason", "length"}}}},
         {"usage", {{"completion_tokens", 1}, {"prompt_tokens", 3}, {"total_tokens", 4}}}});
  });
  const auto logprobs = FindFormAndAsk();
  EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(MessageOf(logprobs.status()),
              AllOf(HasSubstr("does not give the log-probabilities of a prompt"),
                    HasSubstr("HTTP 500: Only no echo is supported"),
                    HasSubstr("no choices[0].prompt_logprobs")));
}

// As it would be if it echoed the text alone: its log-probabilities are those of a chat.
TEST_F(OtherServers, LogprobsOfWhatIsGeneratedAreNotTakenForThePrompts) {
  server_.SetCompletions([](const json&) {
    const json token = {
        {"id", 5}, {"token", "a"}, {"logprob", -0.25}, {"top_logprobs", json::array()}};
    return Json({{"choices", {{{"text", "a"}, {"logprobs", {{"content", {token}}}}}}}});
  });
  const auto logprobs = FindFormAndAsk();
  EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(MessageOf(logprobs.status()), HasSubstr("no choices[0].logprobs.token_logprobs"));
}

// As llama-cpp-python's does of a prompt in ids.
TEST_F(OtherServers, AnErrorOfFastApiIsShown) {
  server_.SetCompletions([](const json&) {
    return Json({{"detail",
                  {{{"type", "string_type"},
                    {"loc", {"body", "prompt"}},
                    {"msg", "Input should be a valid string"}}}}},
                422);
  });
  const auto logprobs = FindFormAndAsk();
  EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(MessageOf(logprobs.status()), HasSubstr("HTTP 422"));
  EXPECT_THAT(MessageOf(logprobs.status()), HasSubstr("Input should be a valid string"));
}

TEST_F(OtherServers, OneWithoutCompletionsIsSaidToScoreNoPrompt) {
  server_.SetCompletions([](const json&) { return Json({{"detail", "Not Found"}}, 404); });
  const auto logprobs = FindFormAndAsk();
  EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(MessageOf(logprobs.status()), HasSubstr("/v1/completions: HTTP 404: Not Found"));
}

TEST_F(OtherServers, AdaptersAreNotTakenForModels) {
  server_.SetModels({{"object", "list"},
                     {"data",
                      {{{"id", "base"},
                        {"object", "model"},
                        {"root", "/m"},
                        {"parent", nullptr},
                        {"max_model_len", 8}},
                       {{"id", "lora"},
                        {"object", "model"},
                        {"root", "/l"},
                        {"parent", "base"},
                        {"max_model_len", nullptr}}}}});
  HttpClient client = Client();
  EXPECT_EQ(FindModel(client, "").value().name, "base");
  EXPECT_EQ(FindModel(client, "").value().max_model_len, 8);
  EXPECT_EQ(FindModel(client, "lora").value().name, "lora");
  EXPECT_EQ(FindModel(client, "lora").value().max_model_len, std::nullopt);
  EXPECT_THAT(MessageOf(FindModel(client, "x").status()), HasSubstr("it has: base, lora"));
}

// llama.cpp's list has a second one beside it, and no length.
TEST_F(OtherServers, AModelOfLlamaCppIsFound) {
  server_.SetModels({{"models", {{{"name", "/m/ernie.gguf"}, {"model", "/m/ernie.gguf"}}}},
                     {"object", "list"},
                     {"data",
                      {{{"id", "/m/ernie.gguf"},
                        {"object", "model"},
                        {"owned_by", "llamacpp"},
                        {"meta", {{"n_vocab", 103424}, {"n_ctx_train", 131072}}}}}}});
  HttpClient client = Client();
  EXPECT_EQ(FindModel(client, "").value().name, "/m/ernie.gguf");
  EXPECT_EQ(FindModel(client, "").value().max_model_len, std::nullopt);
}

TEST_F(OtherServers, AModelThatIsStillLoadedIsWaitedForAndAWrongUrlIsNot) {
  const FakeReply loading = Json(
      {{"error", {{"code", 503}, {"message", "Loading model"}, {"type", "unavailable_error"}}}},
      503);
  server_.AnswerFirst({loading});
  Endpoint endpoint = server_.endpoint();
  endpoint.retry_seconds = 10;
  const Options options;
  const auto report = Evaluate(options, {}, endpoint, &stop_);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->model.name, "poet");

  server_.Stop();
  endpoint.retry_seconds = 3600;
  EXPECT_THAT(MessageOf(Evaluate(options, {}, endpoint, &stop_).status()), HasSubstr("no answer"));
}

TEST_F(OtherServers, AModelThatWasStillThinkingHasNotAnswered) {
  const json message = {{"role", "assistant"}, {"content", nullptr}, {"reasoning_content", "Hm"}};
  server_.AnswerFirst(
      {Json({{"choices", {{{"message", message}, {"finish_reason", "length"}}}}}),
       Json({{"choices", {{{"message", message}, {"finish_reason", "tool_calls"}}}}})});
  HttpClient client = Client();
  EXPECT_THAT(
      MessageOf(GreedyAnswer(client, model_, "q", /*raw=*/false, 9).status()),
      HasSubstr("wrote 9 tokens and had not begun its answer (choices[0].message.content is "
                "null); raise --max-tokens"));
  EXPECT_THAT(MessageOf(GreedyAnswer(client, model_, "q", /*raw=*/false, 9).status()),
              HasSubstr("no choices[0].message.content (finish_reason \"tool_calls\")"));
}

}  // namespace
}  // namespace wintserve::eval
