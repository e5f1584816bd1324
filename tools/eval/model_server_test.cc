#include "tools/eval/model_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "tools/eval/fake_server_test_util.h"

namespace wintserve::eval {
namespace {

using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr int32_t kIds[] = {3, 20, 5};
constexpr PromptForm kEchoForm = {PromptForm::Kind::kEcho, 0, 0};

std::string MessageOf(const absl::Status& status) { return std::string(status.message()); }

class ModelServer : public testing::Test {
 protected:
  HttpClient Client(int retry_seconds = 0) {
    Endpoint endpoint = server_.endpoint();
    endpoint.retry_seconds = retry_seconds;
    endpoint.api_key = api_key_;
    return HttpClient::Create(endpoint, &stop_).value();
  }
  // Of kIds, by a client that asks in the first form.
  absl::StatusOr<std::vector<double>> Ask(int retry_seconds = 0) {
    HttpClient client = Client(retry_seconds);
    return PromptLogprobs(client, {"poet", 64, kEchoForm}, kIds);
  }

  FakeServer server_;
  StopFlag stop_;
  std::string api_key_;
};

TEST_F(ModelServer, GivesTheLogprobOfEveryIdButTheFirst) {
  const auto logprobs = Ask();
  ASSERT_TRUE(logprobs.ok()) << logprobs.status();
  EXPECT_THAT(*logprobs, ElementsAre(0, FakeServer::LogprobOf(20), FakeServer::LogprobOf(5)));
  const json request = server_.requests().back();
  EXPECT_EQ(request["model"], "poet");
  EXPECT_EQ(request["prompt"], json({3, 20, 5}));
  EXPECT_EQ(request["echo"], true);
  EXPECT_EQ(request["logprobs"], 0);
  EXPECT_EQ(request["max_tokens"], 0);
}

TEST_F(ModelServer, IsAskedForATokenIfItRefusesNone) {
  server_.SetCompletions([](const json& body) -> FakeReply {
    if (body["max_tokens"] == 0) return {400, R"({"error": {"message": "at least 1"}})", ""};
    return {200, FakeServer::EchoAnswer(body).dump(), ""};
  });
  HttpClient client = Client();
  ServedModel model{"poet", std::nullopt, std::nullopt};
  ASSERT_TRUE(FindPromptForm(client, &model).ok());
  EXPECT_EQ(model.form->max_tokens, 1);
  EXPECT_EQ(model.form->logprobs, 0);
  const auto logprobs = PromptLogprobs(client, model, kIds);
  ASSERT_TRUE(logprobs.ok()) << logprobs.status();
  EXPECT_EQ(logprobs->size(), 3u);
}

TEST_F(ModelServer, IsAskedForACandidateIfItRefusesNone) {
  server_.SetCompletions([](const json& body) -> FakeReply {
    if (body["logprobs"] == 0 || body["max_tokens"] == 0) return {400, "{}", ""};
    return {200, FakeServer::EchoAnswer(body).dump(), ""};
  });
  HttpClient client = Client();
  ServedModel model{"poet", std::nullopt, std::nullopt};
  ASSERT_TRUE(FindPromptForm(client, &model).ok());
  EXPECT_EQ(model.form->logprobs, 1);
}

TEST_F(ModelServer, IsAskedByItsExtensionIfItKnowsNoEcho) {
  server_.SetCompletions([](const json& body) -> FakeReply {
    if (!body.contains("prompt_logprobs")) return {400, "{}", ""};
    // The likeliest token stands beside the prompt's own.
    json positions = json::array({nullptr});
    for (size_t i = 1; i < body["prompt"].size(); ++i) {
      const int32_t id = body["prompt"][i];
      positions.push_back({{std::to_string(id), {{"logprob", FakeServer::LogprobOf(id)}}},
                           {"77", {{"logprob", -0.1}}}});
    }
    return {200, json({{"choices", {{{"prompt_logprobs", positions}}}}}).dump(), ""};
  });
  HttpClient client = Client();
  ServedModel model{"poet", std::nullopt, std::nullopt};
  ASSERT_TRUE(FindPromptForm(client, &model).ok());
  EXPECT_EQ(model.form->kind, PromptForm::Kind::kPromptLogprobs);
  const auto logprobs = PromptLogprobs(client, model, kIds);
  ASSERT_TRUE(logprobs.ok()) << logprobs.status();
  EXPECT_THAT(*logprobs, ElementsAre(0, FakeServer::LogprobOf(20), FakeServer::LogprobOf(5)));
}

TEST_F(ModelServer, ThatCannotScoreAPromptIsToldWithItsOwnWords) {
  server_.SetCompletions([](const json&) -> FakeReply {
    return {400, R"({"error": {"message": "echo: is not supported with logprobs"}})", ""};
  });
  HttpClient client = Client();
  ServedModel model{"poet", std::nullopt, std::nullopt};
  const absl::Status status = FindPromptForm(client, &model);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(MessageOf(status), HasSubstr("does not give the log-probabilities of a prompt"));
  EXPECT_THAT(MessageOf(status), HasSubstr("echo: is not supported with logprobs"));
}

// As servers do that know "echo" for text alone.
TEST_F(ModelServer, ThatScoresOnlyWhatItGeneratesCannotScoreAPrompt) {
  server_.SetCompletions([](const json&) -> FakeReply {
    return {200, R"({"choices": [{"logprobs": {"token_logprobs": [-1]}}]})", ""};
  });
  HttpClient client = Client();
  ServedModel model{"poet", std::nullopt, std::nullopt};
  const absl::Status status = FindPromptForm(client, &model);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(MessageOf(status), HasSubstr("log-probabilities of 1 tokens for a prompt of 3"));
}

TEST_F(ModelServer, WithAWrongKeyIsNotAskedInOtherForms) {
  server_.SetApiKey("right");
  api_key_ = "wrong";
  HttpClient client = Client();
  ServedModel model{"poet", std::nullopt, std::nullopt};
  const absl::Status status = FindPromptForm(client, &model);
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(MessageOf(status), HasSubstr("HTTP 401: wrong key"));
  EXPECT_EQ(server_.num_requests(), 1);
  api_key_ = "right";
  EXPECT_TRUE(Ask().ok());
}

TEST_F(ModelServer, GetsNoPromptThatIsLongerThanItTakes) {
  HttpClient client = Client();
  const auto logprobs =
      PromptLogprobs(client, {"poet", 3, PromptForm{PromptForm::Kind::kEcho, 1, 0}}, kIds);
  EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(MessageOf(logprobs.status()),
              HasSubstr("3 tokens; the server takes at most 2 (its max_model_len is 3)"));
  EXPECT_EQ(server_.num_requests(), 0);
}

struct BadAnswer {
  const char* name;
  const char* body;
  const char* error;
};

class BadAnswers : public ModelServer, public testing::WithParamInterface<BadAnswer> {};

TEST_P(BadAnswers, AreToldApart) {
  server_.SetCompletions([](const json&) -> FakeReply { return {200, GetParam().body, ""}; });
  const auto logprobs = Ask();
  EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kInternal);
  EXPECT_THAT(MessageOf(logprobs.status()), HasSubstr(GetParam().error));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadAnswers,
    testing::Values(
        BadAnswer{"NoJson", "<html>\n\t<b>", "the answer is no JSON object: <html>  <b>"},
        BadAnswer{"Empty", "", "the answer is no JSON object: nothing"},
        BadAnswer{"AboveOne", R"({"choices": [{"logprobs": {"token_logprobs": [null,-1,3.5]}}]})",
                  "3.5 as the log-probability of token 2, which is none"},
        BadAnswer{"NoChoices", "{}", "no choices[0].logprobs.token_logprobs"},
        BadAnswer{"NullLogprobs", R"({"choices": [{"logprobs": null}]})",
                  "no choices[0].logprobs.token_logprobs"},
        BadAnswer{"TooMany", R"({"choices": [{"logprobs": {"token_logprobs": [null,-1,-1,-1]}}]})",
                  "log-probabilities of 4 tokens for a prompt of 3"},
        BadAnswer{"Null", R"({"choices": [{"logprobs": {"token_logprobs": [null,-1,null]}}]})",
                  "null as the log-probability of token 2"},
        BadAnswer{"OtherPrompt",
                  R"({"choices": [{"logprobs": {"token_logprobs": [null,-1,-1]}}],
                      "usage": {"prompt_tokens": 4}})",
                  "counted 4 tokens of a prompt of 3"}),
    [](const auto& info) { return info.param.name; });

TEST_F(ModelServer, IsAskedAgainWhenItWasBusyAfterTheTimeThatItNames) {
  server_.AnswerFirst({{429, R"({"error": {"message": "full"}})", "1"}, {503, "", "0"}});
  const auto begin = std::chrono::steady_clock::now();
  const auto logprobs = Ask(/*retry_seconds=*/10);
  ASSERT_TRUE(logprobs.ok()) << logprobs.status();
  EXPECT_EQ(server_.num_requests(), 3);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::seconds(1));
}

TEST_F(ModelServer, ThatStaysBusyLongerThanAllowedIsGivenUpAtOnce) {
  server_.AnswerFirst({{429, R"({"error": {"message": "full"}})", "3600"}});
  const auto logprobs = Ask(/*retry_seconds=*/10);
  EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(MessageOf(logprobs.status()), HasSubstr("HTTP 429: full"));
  EXPECT_EQ(server_.num_requests(), 1);
}

TEST_F(ModelServer, IsNotAskedAgainAfterOtherErrors) {
  for (const auto& [status, code] : {std::pair{400, absl::StatusCode::kInvalidArgument},
                                     {422, absl::StatusCode::kInvalidArgument},
                                     {404, absl::StatusCode::kNotFound},
                                     {500, absl::StatusCode::kInternal}}) {
    server_.AnswerFirst({{status, R"({"message": "no"})", ""}});
    const int num_before = server_.num_requests();
    const auto logprobs = Ask(/*retry_seconds=*/10);
    EXPECT_EQ(logprobs.status().code(), code) << status;
    EXPECT_EQ(server_.num_requests(), num_before + 1);
  }
}

TEST_F(ModelServer, ThatIsGoneIsNamed) {
  server_.Stop();
  const auto logprobs = Ask();
  EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(MessageOf(logprobs.status()), HasSubstr(server_.endpoint().url));
  EXPECT_THAT(MessageOf(logprobs.status()), HasSubstr("no answer"));
}

TEST_F(ModelServer, IsNotWaitedForOnceStopIsSet) {
  server_.AnswerFirst({{503, "", "3000"}, {503, "", "3000"}});
  std::thread other([this] {
    while (server_.num_requests() == 0) std::this_thread::yield();
    stop_.Set();
  });
  const auto logprobs = Ask(/*retry_seconds=*/86400);
  other.join();
  EXPECT_EQ(logprobs.status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(ModelServer, NamesItsOnlyModel) {
  HttpClient client = Client();
  const auto model = FindModel(client, "");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->name, "poet");
  EXPECT_EQ(model->max_model_len, 64);
}

TEST_F(ModelServer, ListsItsModelsWhenItLacksTheOne) {
  server_.SetModels({{"data", {{{"id", "a"}}, {{"id", "b"}}}}});
  HttpClient client = Client();
  EXPECT_EQ(FindModel(client, "b").value().name, "b");
  EXPECT_EQ(FindModel(client, "c").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(MessageOf(FindModel(client, "c").status()),
              HasSubstr("has no model 'c'; it has: a, b"));
  EXPECT_THAT(MessageOf(FindModel(client, "").status()), HasSubstr("has several: a, b"));
}

TEST_F(ModelServer, AnswersGreedilyWithAndWithoutTheTemplate) {
  HttpClient client = Client();
  EXPECT_EQ(GreedyAnswer(client, {"poet", 64, std::nullopt}, "ab", false, 9).value(), "abab");
  EXPECT_EQ(server_.requests().back()["temperature"], 0);
  EXPECT_EQ(server_.requests().back()["max_tokens"], 9);
  EXPECT_EQ(GreedyAnswer(client, {"poet", 64, std::nullopt}, "ab", true, 9).value(), "ab");
}

TEST(HttpClientUrl, MayEndAsClientsOfTheInterfaceWriteIt) {
  FakeServer server;
  StopFlag stop;
  for (const char* end : {"/", "/v1", "/v1/"}) {
    Endpoint endpoint = server.endpoint();
    endpoint.url += end;
    HttpClient client = HttpClient::Create(endpoint, &stop).value();
    EXPECT_TRUE(client.Get("/v1/models").ok()) << end;
  }
}

TEST(HttpClientUrl, ThatNamesNoServerIsRefused) {
  StopFlag stop;
  Endpoint endpoint;
  for (const char* url :
       {"http://:80", "http://h:0", "http://h:99999", "http://h:x", "http://u:p@h", "http://h?x=1",
        "http://h/v1#a", "http:// h", "https://"}) {
    endpoint.url = url;
    const auto client = HttpClient::Create(endpoint, &stop);
    EXPECT_EQ(client.status().code(), absl::StatusCode::kInvalidArgument) << url;
  }
  for (const char* url : {"http://h", "http://h:65535/a/b", "http://[::1]", "http://[::1]:80/v1"}) {
    endpoint.url = url;
    EXPECT_TRUE(HttpClient::Create(endpoint, &stop).ok()) << url;
  }
}

TEST_F(ModelServer, WhoseAnswerHasNoEndIsNotListenedToForEver) {
  Endpoint endpoint = server_.endpoint();
  endpoint.max_answer_bytes = 20'000;
  HttpClient client = HttpClient::Create(endpoint, &stop_).value();
  server_.AnswerFirst({{200, std::string(20'001, ' '), ""}, {200, std::string(20'000, ' '), ""}});
  EXPECT_THAT(MessageOf(client.Get("/v1/models").status()),
              HasSubstr("/v1/models: the answer has more than 20000 bytes"));
  EXPECT_THAT(MessageOf(client.Get("/v1/models").status()), HasSubstr("no JSON object"));
  EXPECT_TRUE(client.Get("/v1/models").ok());
}

// A megabyte of '[' is nothing to a parser, and all of the stack to who prints what it has read.
TEST_F(ModelServer, WhoseAnswerIsNestedWithoutEndIsNotFollowed) {
  const std::string deep(1'000'000, '[');
  const std::string nested = deep + std::string(deep.size(), ']');
  server_.AnswerFirst(
      {{200, R"({"choices": [{"logprobs": {"token_logprobs": )" + nested + "}}]}", ""},
       {400, R"({"error": {"message": )" + nested + "}}", ""}});
  EXPECT_THAT(MessageOf(Ask().status()),
              HasSubstr("the answer is no JSON object of at most 64 levels: {\"choices\""));
  EXPECT_THAT(MessageOf(Ask().status()), HasSubstr("HTTP 400: {\"error\""));
}

TEST(HttpClientUrl, WithoutASchemeIsRefused) {
  StopFlag stop;
  Endpoint endpoint;
  endpoint.url = "localhost:8180";
  const auto client = HttpClient::Create(endpoint, &stop);
  EXPECT_EQ(client.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(MessageOf(client.status()), HasSubstr("--server: must begin with http://"));
}

}  // namespace
}  // namespace wintserve::eval
