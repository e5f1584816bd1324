// A connection's bytes: requests behind each other, parsed and checked as session.cc does, whole
// and in pieces. What is accepted must not depend on how the bytes were cut.
#include <algorithm>
#include <boost/asio/buffer.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/error.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "api_server/http/request_head.h"
#include "api_server/http/routes.h"
#include "common/check.h"
#include "tests/fuzz/fuzz_target.h"

namespace wintserve {
namespace {

namespace http = boost::beast::http;
using boost::system::error_code;

HttpOptions SmallLimits() {
  HttpOptions options;
  options.max_header_bytes = 512;
  options.max_body_bytes = 512;
  return options;
}

struct Accepted {
  std::string method;
  std::string path;
  std::string authorization;
  bool keep_alive = false;
  std::string body;
  bool operator==(const Accepted&) const = default;
};

// The socket: gives `piece_bytes` of the input at a time.
class Peer {
 public:
  Peer(std::string_view input, size_t piece_bytes)
      : input_(input), piece_bytes_(piece_bytes), buffer_(4096) {}

  // As async_read_header and async_read do.
  error_code ParseUntil(HttpParser* parser, bool (HttpParser::*done)() const) {
    error_code error;
    while (!(parser->*done)()) {
      // Bytes from before may be all that is needed.
      if (buffer_.size() > 0) {
        buffer_.consume(parser->put(buffer_.data(), error));
        if (error != http::error::need_more) {
          if (error) return error;
          continue;
        }
      }
      const size_t count = std::min(piece_bytes_, input_.size());
      if (count == 0) {
        error = {};
        if (!parser->got_some()) return http::error::end_of_stream;
        parser->put_eof(error);
        return error;
      }
      if (buffer_.size() + count > buffer_.max_size()) return http::error::buffer_overflow;
      boost::asio::buffer_copy(buffer_.prepare(count), boost::asio::buffer(input_.data(), count));
      buffer_.commit(count);
      input_.remove_prefix(count);
    }
    return error;
  }

 private:
  std::string_view input_;
  const size_t piece_bytes_;
  boost::beast::flat_buffer buffer_;
};

void CheckReply(const RequestHead& head, const Reply& reply) {
  CHECK(reply.status >= 400 && reply.status < 600, "{}", reply.status);
  const auto body = nlohmann::json::parse(reply.body, nullptr, /*allow_exceptions=*/false);
  CHECK(body.is_object() && body["error"]["message"].is_string(), "{}", reply.body);
  const std::string text =
      SerializeHead(head, reply, head.keep_alive, static_cast<int64_t>(reply.body.size()));
  CHECK(text.starts_with("HTTP/1.") && text.find("\r\n\r\n") == text.size() - 4, "{}", text);
  CHECK(std::count(text.begin(), text.end(), '\n') <= 12, "{}", text);
}

std::vector<Accepted> ServeAll(std::string_view input, size_t piece_bytes) {
  static const HttpOptions options = SmallLimits();
  static const ApiKeys keys({"sk-test"});
  std::vector<Accepted> accepted;
  Peer peer(input, piece_bytes);
  while (true) {
    HttpParser parser;
    SetLimits(options, &parser);
    error_code error = peer.ParseUntil(&parser, &HttpParser::is_header_done);
    if (IsHangUp(error)) return accepted;
    const RequestHead head = HeadOf(parser);
    CHECK(!head.request_id.empty() && head.request_id.size() <= 128);
    const RouteMatch match = FindRoute(head.target, Port::kHttpWithMetrics);
    std::optional<Reply> refusal;
    if (error) {
      refusal = MalformedReply(error, options);
    } else {
      refusal = CheckHead(head, match, keys);
    }
    if (!refusal.has_value() && head.has_body) {
      error = peer.ParseUntil(&parser, &HttpParser::is_done);
      if (IsHangUp(error)) return accepted;
      if (error) refusal = MalformedReply(error, options);
    }
    if (refusal.has_value()) {
      CheckReply(head, *refusal);
      if (error || head.has_body || !head.keep_alive) return accepted;
      continue;
    }
    CHECK(match.route != nullptr);
    CHECK(static_cast<int64_t>(parser.get().body().size()) <= options.max_body_bytes);
    accepted.push_back(
        {head.method, match.path, head.authorization, head.keep_alive, parser.get().body()});
    if (!head.keep_alive) return accepted;
  }
}

}  // namespace

void FuzzInput(std::string_view input) {
  const std::vector<Accepted> whole = ServeAll(input, 4096);
  for (const size_t piece_bytes : {1, 7}) {
    const std::vector<Accepted> pieces = ServeAll(input, piece_bytes);
    CHECK(pieces == whole, "{} requests in pieces of {}, else {}", pieces.size(), piece_bytes,
          whole.size());
  }
}

}  // namespace wintserve
