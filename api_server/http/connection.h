// One accepted socket: reading requests, writing answers, noticing that the peer has gone.
#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <string>
#include <utility>  // before Asio's coroutine header, which needs it

#include "api_server/http/http_server.h"
#include "api_server/http/message.h"
#include "api_server/http/request_head.h"

namespace wintserve {

// Lives on one IO thread. Operations of one direction do not overlap; UntilPeerCloses may run
// beside writes. Bytes that come early (pipelined requests) wait in the buffer for the next
// ReadHead.
class Connection {
 public:
  using Parser = HttpParser;
  template <typename T>
  using Awaitable = boost::asio::awaitable<T>;
  using ErrorCode = boost::system::error_code;

  Connection(boost::asio::ip::tcp::socket socket, const HttpOptions& options);

  // False: the peer closed, or nothing came within the idle timeout.
  Awaitable<bool> WaitForRequest();
  bool is_idle() const { return is_idle_; }

  Awaitable<ErrorCode> ReadHead(Parser& parser);
  Awaitable<ErrorCode> ReadBody(Parser& parser);

  // False: the peer is gone, or took nothing for the client stall timeout.
  Awaitable<bool> Write(std::string bytes);
  // Head and body in one write; the body is left out for HEAD.
  Awaitable<bool> Send(const RequestHead& request, const Reply& reply, bool keep_alive);

  // Returns once the peer has closed its side (the connection is then closed too, so a write under
  // way fails at once) or has sent more than a request's worth ahead. Ends early when cancelled.
  Awaitable<void> UntilPeerCloses();

  // Closes so that the peer can still read the last answer: what it goes on sending is read and
  // dropped for a while, because a close with unread bytes resets the connection.
  Awaitable<void> LingeringClose();
  void Close();

 private:
  const HttpOptions& options_;
  boost::beast::tcp_stream stream_;
  boost::beast::flat_buffer buffer_;
  bool is_idle_ = false;
};

}  // namespace wintserve
