#include "tools/eval/fake_server_test_util.h"

#include <fmt/format.h>

#include <utility>

#include "common/check.h"

namespace wintserve::eval {

using nlohmann::json;

FakeServer::FakeServer() : models_({{"data", {{{"id", "poet"}, {"max_model_len", 64}}}}}) {
  const auto answer = [this](const httplib::Request& request, httplib::Response& response) {
    Answer(request, &response);
  };
  server_.Get(".*", answer);
  server_.Post(".*", answer);
  port_ = server_.bind_to_any_port("127.0.0.1");
  CHECK(port_ > 0);
  thread_ = std::thread([this] { server_.listen_after_bind(); });
  while (!server_.is_running()) std::this_thread::yield();
}

FakeServer::~FakeServer() { Stop(); }

void FakeServer::Stop() {
  if (!thread_.joinable()) return;
  server_.stop();
  thread_.join();
}

json FakeServer::EchoAnswer(const json& body) {
  const std::vector<int32_t> ids = body.at("prompt");
  const int max_tokens = body.at("max_tokens");
  json logprobs = json::array({nullptr});
  for (size_t i = 1; i < ids.size(); ++i) logprobs.push_back(LogprobOf(ids[i]));
  for (int i = 0; i < max_tokens; ++i) logprobs.push_back(-9.0);
  return {{"choices", {{{"text", ""}, {"logprobs", {{"token_logprobs", logprobs}}}}}},
          {"usage", {{"prompt_tokens", ids.size()}, {"completion_tokens", max_tokens}}}};
}

Endpoint FakeServer::endpoint() const {
  Endpoint endpoint;
  endpoint.url = fmt::format("http://127.0.0.1:{}", port_);
  endpoint.retry_seconds = 0;
  endpoint.timeout_seconds = 10;
  return endpoint;
}

void FakeServer::AnswerFirst(std::deque<FakeReply> replies) {
  const MutexLock lock(&mu_);
  first_ = std::move(replies);
}

void FakeServer::SetCompletions(Handler handler) {
  const MutexLock lock(&mu_);
  completions_ = std::move(handler);
}

void FakeServer::SetModels(json models) {
  const MutexLock lock(&mu_);
  models_ = std::move(models);
}

void FakeServer::SetApiKey(std::string key) {
  const MutexLock lock(&mu_);
  api_key_ = std::move(key);
}

std::vector<json> FakeServer::requests() {
  const MutexLock lock(&mu_);
  return requests_;
}

void FakeServer::Answer(const httplib::Request& request, httplib::Response* response) {
  const FakeReply reply = ReplyTo(request);
  response->status = reply.status;
  response->set_content(reply.body, "application/json");
  if (!reply.retry_after.empty()) response->set_header("Retry-After", reply.retry_after);
}

FakeReply FakeServer::ReplyTo(const httplib::Request& request) {
  const MutexLock lock(&mu_);
  const json body = json::parse(request.body, nullptr, /*allow_exceptions=*/false);
  if (request.method == "POST") requests_.push_back(body);
  if (!first_.empty()) {
    FakeReply reply = first_.front();
    first_.pop_front();
    return reply;
  }
  if (!api_key_.empty() && request.get_header_value("Authorization") != "Bearer " + api_key_) {
    return {401, R"({"error": {"message": "wrong key"}})", ""};
  }
  if (request.path == "/v1/models") return {200, models_.dump(), ""};
  if (request.path == "/v1/chat/completions") {
    const std::string content = body.at("messages").back().at("content");
    const json message = {{"role", "assistant"}, {"content", content + content}};
    return {200, json({{"choices", {{{"message", message}}}}}).dump(), ""};
  }
  if (request.path != "/v1/completions") return {404, R"({"detail": "Not Found"})", ""};
  if (completions_) return completions_(body);
  if (body.value("echo", false)) return {200, EchoAnswer(body).dump(), ""};
  return {200, json({{"choices", {{{"text", body.at("prompt")}}}}}).dump(), ""};
}

}  // namespace wintserve::eval
