#include "api_server/http/request_head.h"

#include <fmt/core.h>

#include <boost/asio/error.hpp>
#include <boost/beast/core/string.hpp>
#include <boost/beast/http/error.hpp>

namespace wintserve {
namespace {

namespace net = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

template <typename Field>
std::string HeaderValue(const HttpParser& parser, Field field) {
  const auto value = parser.get()[field];
  return std::string(value.data(), value.size());
}

}  // namespace

void SetLimits(const HttpOptions& options, HttpParser* parser) {
  parser->header_limit(static_cast<std::uint32_t>(options.max_header_bytes));
  parser->body_limit(static_cast<std::uint64_t>(options.max_body_bytes));
}

RequestHead HeadOf(const HttpParser& parser) {
  const auto& message = parser.get();
  RequestHead head;
  head.method = std::string(message.method_string());
  head.target = std::string(message.target());
  head.version = static_cast<int>(message.version());
  head.keep_alive = message.keep_alive();
  head.has_body = !parser.is_done();
  head.has_host = message.find(http::field::host) != message.end();
  head.expect = HeaderValue(parser, http::field::expect);
  head.expects_continue = boost::beast::iequals(head.expect, "100-continue");
  head.content_type = HeaderValue(parser, http::field::content_type);
  head.content_encoding = HeaderValue(parser, http::field::content_encoding);
  head.authorization = HeaderValue(parser, http::field::authorization);
  head.request_id = SaneRequestId(HeaderValue(parser, "x-request-id"));
  return head;
}

bool IsHangUp(error_code error) {
  if (!error) return false;
  return error == http::error::end_of_stream || error == http::error::partial_message ||
         error == boost::beast::error::timeout ||
         error.category() == net::error::get_system_category() ||
         error.category() == net::error::get_misc_category();
}

Reply MalformedReply(error_code error, const HttpOptions& options) {
  if (error == http::error::body_limit) {
    return ErrorReply(413, "body_too_large",
                      fmt::format("the body is larger than {} bytes", options.max_body_bytes));
  }
  if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    return ErrorReply(431, "header_too_large",
                      fmt::format("the header is larger than {} bytes", options.max_header_bytes));
  }
  if (error == http::error::bad_version) {
    return ErrorReply(505, "http_version_not_supported", "only HTTP/1.0 and HTTP/1.1 are spoken");
  }
  return ErrorReply(400, "invalid_http",
                    fmt::format("the request is not valid HTTP: {}", error.message()));
}

}  // namespace wintserve
