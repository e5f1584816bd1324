// JSON over HTTP, repeated while the server is busy.
#pragma once

#include <httplib.h>

#include <cstddef>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "tools/eval/stop_flag.h"

namespace wintserve::eval {

struct Endpoint {
  // "http://127.0.0.1:8180"; https and a path in front of "/v1" are possible, a "/v1" or "/" at its
  // end is cut off.
  std::string url;
  std::string api_key;           // empty: none is sent
  int retry_seconds = 60;        // how long one request is repeated
  int timeout_seconds = 600;     // without a byte
  bool retry_connecting = true;  // also where nobody listens, not only where a server is busy
  // Of an answer. A million log-probabilities with their tokens, the most that wintserve gives,
  // take a tenth of it.
  size_t max_answer_bytes = size_t{1} << 30;
};

// One connection, kept open. Threading: one thread.
//
// A request is sent again after 429, 502, 503 and 504 (when Retry-After says, or after 1, 2, 4, …
// at most 30 s) and, with retry_connecting, after a connection that failed, until retry_seconds are
// over. Errors carry the
// server's own message:
//   INVALID_ARGUMENT    400 or 422, or no URL      PERMISSION_DENIED   401 or 403
//   NOT_FOUND           404                        INTERNAL            other answers, more than
//   allowed,
//                                                                      no JSON or nested too deep
//   UNAVAILABLE         busy or away until the end, at once if `stop` is set
class HttpClient {
 public:
  // `stop` must live longer; it ends waiting, not a request on its way.
  static absl::StatusOr<HttpClient> Create(const Endpoint& endpoint, StopFlag* stop);

  absl::StatusOr<nlohmann::json> Get(const std::string& path);
  absl::StatusOr<nlohmann::json> Post(const std::string& path, const nlohmann::json& body);

  const std::string& url() const { return endpoint_.url; }

 private:
  HttpClient(Endpoint endpoint, std::string prefix, std::unique_ptr<httplib::Client> client,
             StopFlag* stop);
  absl::StatusOr<nlohmann::json> Send(const char* method, const std::string& path,
                                      const std::string& body);

  Endpoint endpoint_;
  std::string prefix_;  // of every path
  std::unique_ptr<httplib::Client> client_;
  StopFlag* stop_;
};

}  // namespace wintserve::eval
