// From the library's parser to RequestHead, and what to say of a request that it refuses.
#pragma once

#include <boost/beast/core/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>

#include "api_server/http/http_server.h"
#include "api_server/http/message.h"

namespace wintserve {

using HttpParser = boost::beast::http::request_parser<boost::beast::http::string_body>;

// Before the first byte is read.
void SetLimits(const HttpOptions& options, HttpParser* parser);

// What has been parsed so far: after an error, fields may be missing.
RequestHead HeadOf(const HttpParser& parser);

// The peer is gone or said nothing: there is nobody to answer.
bool IsHangUp(boost::system::error_code error);

// REQUIRES: an error that is no hang-up.
Reply MalformedReply(boost::system::error_code error, const HttpOptions& options);

}  // namespace wintserve
