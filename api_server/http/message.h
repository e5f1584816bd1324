// One request's head and one answer, without the library that parses and sends them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "api_server/openai/api_error.h"

namespace wintserve {

// Non-standard but usual in logs: the client went away before the answer.
inline constexpr int kStatusClientClosed = 499;

struct RequestHead {
  std::string method;
  std::string target;
  int version = 11;         // 10 or 11
  bool keep_alive = false;  // the client's wish
  bool has_body = false;    // one follows, whether or not it has been read
  bool expects_continue = false;
  bool has_host = false;
  std::string expect;
  std::string content_type;
  std::string content_encoding;
  std::string authorization;
  std::string request_id;  // the client's if it is sane, else a fresh one
};

struct Reply {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;  // beyond those of every answer
};

// 429 and 503 also say when to come again, 504 that OpenAI's client should not.
Reply ErrorReply(const ApiError& error, int retry_after_seconds = 1);
// An invalid_request_error of HTTP itself: 404, 405, 413, …
Reply ErrorReply(int status, std::string_view code, std::string_view message);

// `id` when it is 1 to 128 printable ASCII characters, else a fresh UUID.
std::string SaneRequestId(std::string_view id);

// Status line and headers, ready to send before a body of content_length bytes. content_length -1:
// a chunked body, or for an HTTP/1.0 client one that ends with the connection.
std::string SerializeHead(const RequestHead& request, const Reply& reply, bool keep_alive,
                          int64_t content_length);

// One chunk of a chunked body; for an HTTP/1.0 client the bytes as they are.
std::string Chunk(const RequestHead& request, std::string_view bytes);
std::string LastChunk(const RequestHead& request);

}  // namespace wintserve
