#include "api_server/http/message.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/beast/http/status.hpp>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "api_server/openai/ids.h"

namespace wintserve {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;

std::string_view ReasonPhrase(int status) {
  const auto phrase =
      boost::beast::http::obsolete_reason(static_cast<boost::beast::http::status>(status));
  return {phrase.data(), phrase.size()};
}

std::string HttpDate() {
  return absl::FormatTime("%a, %d %b %E4Y %H:%M:%S GMT", absl::Now(), absl::UTCTimeZone());
}

}  // namespace

Reply ErrorReply(const ApiError& error, int retry_after_seconds) {
  Reply reply;
  reply.status = error.http_status;
  reply.body = ErrorBody(error);
  if (error.http_status == 401) reply.headers.emplace_back("WWW-Authenticate", "Bearer");
  if (error.http_status == 429 || error.http_status == 503) {
    reply.headers.emplace_back("Retry-After", std::to_string(retry_after_seconds));
  }
  // The time that the client allowed is over. Its library would ask again twice, unasked.
  if (error.http_status == 504) reply.headers.emplace_back("x-should-retry", "false");
  return reply;
}

Reply ErrorReply(int status, std::string_view code, std::string_view message) {
  ApiError error;
  error.http_status = status;
  error.type = "invalid_request_error";
  error.code = std::string(code);
  error.message = std::string(message);
  return ErrorReply(error);
}

std::string SaneRequestId(std::string_view id) {
  const bool is_sane = !id.empty() && id.size() <= kMaxRequestIdBytes &&
                       std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c < 127; });
  return is_sane ? std::string(id) : NewUuid();
}

std::string SerializeHead(const RequestHead& request, const Reply& reply, bool keep_alive,
                          int64_t content_length) {
  const bool is_http_1_0 = request.version < 11;
  std::string head = fmt::format("HTTP/1.{} {} {}\r\n", is_http_1_0 ? 0 : 1, reply.status,
                                 ReasonPhrase(reply.status));
  const auto add = [&](std::string_view name, std::string_view value) {
    fmt::format_to(std::back_inserter(head), "{}: {}\r\n", name, value);
  };
  add("Date", HttpDate());
  add("x-request-id", request.request_id);
  add("Content-Type", reply.content_type);
  for (const auto& [name, value] : reply.headers) add(name, value);
  if (content_length >= 0) {
    add("Content-Length", std::to_string(content_length));
  } else if (!is_http_1_0) {
    add("Transfer-Encoding", "chunked");
  }
  if (!keep_alive) add("Connection", "close");
  if (keep_alive && is_http_1_0) add("Connection", "keep-alive");
  head += "\r\n";
  return head;
}

std::string Chunk(const RequestHead& request, std::string_view bytes) {
  if (request.version < 11) return std::string(bytes);
  return fmt::format("{:x}\r\n{}\r\n", bytes.size(), bytes);
}

std::string LastChunk(const RequestHead& request) {
  return request.version < 11 ? "" : "0\r\n\r\n";
}

}  // namespace wintserve
