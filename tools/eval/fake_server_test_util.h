// For tests: a server with the OpenAI interface that computes nothing.
#pragma once

#include <httplib.h>

#include <deque>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "common/mutex.h"
#include "tools/eval/http_client.h"

namespace wintserve::eval {

struct FakeReply {
  int status = 200;
  std::string body;
  std::string retry_after;  // header, if any
};

// Listens on a free loopback port until its end. Log-probability of an id: LogprobOf. The answer to
// a chat is its last message's content, twice; the continuation of a prompt, the prompt.
class FakeServer {
 public:
  using Handler = std::function<FakeReply(const nlohmann::json& body)>;

  FakeServer();
  ~FakeServer();

  static double LogprobOf(int32_t id) { return -0.125 * static_cast<double>(id % 16); }
  // The answer to a request with "echo" and "logprobs", as the interface has it.
  static nlohmann::json EchoAnswer(const nlohmann::json& body);

  Endpoint endpoint() const;
  // These come before any answer, one each, whatever is asked. Call before any request.
  void AnswerFirst(std::deque<FakeReply> replies) EXCLUDES(mu_);
  // Instead of the usual answer of /v1/completions.
  void SetCompletions(Handler handler) EXCLUDES(mu_);
  void SetModels(nlohmann::json models) EXCLUDES(mu_);
  void SetApiKey(std::string key) EXCLUDES(mu_);
  // From now on nobody answers.
  void Stop();
  // Bodies of all POST requests that came.
  std::vector<nlohmann::json> requests() EXCLUDES(mu_);
  int num_requests() { return static_cast<int>(requests().size()); }

 private:
  void Answer(const httplib::Request& request, httplib::Response* response) EXCLUDES(mu_);
  FakeReply ReplyTo(const httplib::Request& request) EXCLUDES(mu_);

  httplib::Server server_;
  int port_ = 0;
  Mutex mu_;
  std::deque<FakeReply> first_ GUARDED_BY(mu_);
  Handler completions_ GUARDED_BY(mu_);
  nlohmann::json models_ GUARDED_BY(mu_);
  std::string api_key_ GUARDED_BY(mu_);
  std::vector<nlohmann::json> requests_ GUARDED_BY(mu_);
  std::thread thread_;
};

}  // namespace wintserve::eval
