#include "api_server/http/connection.h"

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/http/read.hpp>

namespace wintserve {
namespace {

namespace net = boost::asio;
namespace beast = boost::beast;

constexpr size_t kReadBytes = 4096;
constexpr size_t kIdleBufferBytes = 16 << 10;  // what a connection between requests may keep
// The kernel's own choice is several MiB, for each client that does not read. It also lets a write
// go on only when a third of that is free, which a slow client would take for ever to do.
constexpr int kSendBufferBytes = 128 << 10;
constexpr std::chrono::seconds kLingerTimeout(2);
constexpr size_t kMaxLingerBytes = 64 << 20;

constexpr auto kAsTuple = net::as_tuple(net::use_awaitable);

// What may be ahead of the parser: one whole request.
size_t MaxBufferedBytes(const HttpOptions& options) {
  return static_cast<size_t>(options.max_header_bytes + options.max_body_bytes) + kReadBytes;
}

}  // namespace

Connection::Connection(net::ip::tcp::socket socket, const HttpOptions& options)
    : options_(options), stream_(std::move(socket)), buffer_(MaxBufferedBytes(options)) {
  ErrorCode ignored;  // the peer may be gone already; reading will tell
  stream_.socket().set_option(net::ip::tcp::no_delay(true), ignored);
  stream_.socket().set_option(net::socket_base::send_buffer_size(kSendBufferBytes), ignored);
}

Connection::Awaitable<bool> Connection::WaitForRequest() {
  if (buffer_.size() > 0) co_return true;
  if (buffer_.capacity() > kIdleBufferBytes) buffer_.shrink_to_fit();
  stream_.expires_after(options_.idle_timeout);
  is_idle_ = true;
  const auto [error, num_bytes] =
      co_await stream_.async_read_some(buffer_.prepare(kReadBytes), kAsTuple);
  is_idle_ = false;
  buffer_.commit(num_bytes);
  co_return !error;
}

Connection::Awaitable<Connection::ErrorCode> Connection::ReadHead(Parser& parser) {
  stream_.expires_after(options_.read_timeout);
  const auto [error, num_bytes] =
      co_await beast::http::async_read_header(stream_, buffer_, parser, kAsTuple);
  co_return error;
}

Connection::Awaitable<Connection::ErrorCode> Connection::ReadBody(Parser& parser) {
  stream_.expires_after(options_.read_timeout);
  const auto [error, num_bytes] =
      co_await beast::http::async_read(stream_, buffer_, parser, kAsTuple);
  co_return error;
}

Connection::Awaitable<bool> Connection::Write(std::string bytes) {
  for (size_t num_written = 0; num_written < bytes.size();) {
    stream_.expires_after(options_.client_stall_timeout);
    const auto [error, num_bytes] =
        co_await stream_.async_write_some(net::buffer(bytes) + num_written, kAsTuple);
    if (error) co_return false;
    num_written += num_bytes;
  }
  co_return true;
}

Connection::Awaitable<bool> Connection::Send(const RequestHead& request, const Reply& reply,
                                             bool keep_alive) {
  std::string bytes =
      SerializeHead(request, reply, keep_alive, static_cast<int64_t>(reply.body.size()));
  if (request.method != "HEAD") bytes += reply.body;
  const bool sent = co_await Write(std::move(bytes));
  co_return sent;
}

Connection::Awaitable<void> Connection::UntilPeerCloses() {
  // On the socket itself, without the stream's timeout: an answer may take as long as it takes.
  while (buffer_.size() + kReadBytes <= buffer_.max_size()) {
    const auto [error, num_bytes] =
        co_await stream_.socket().async_read_some(buffer_.prepare(kReadBytes), kAsTuple);
    if (error == net::error::operation_aborted) co_return;
    if (error) break;
    buffer_.commit(num_bytes);
  }
  Close();
}

Connection::Awaitable<void> Connection::LingeringClose() {
  ErrorCode error;
  stream_.socket().shutdown(net::ip::tcp::socket::shutdown_send, error);
  stream_.expires_after(kLingerTimeout);
  buffer_.consume(buffer_.size());
  for (size_t dropped = 0; !error && dropped < kMaxLingerBytes;) {
    const auto [read_error, num_bytes] =
        co_await stream_.async_read_some(buffer_.prepare(kReadBytes), kAsTuple);
    error = read_error;
    dropped += num_bytes;
  }
  Close();
}

void Connection::Close() { stream_.close(); }

}  // namespace wintserve
