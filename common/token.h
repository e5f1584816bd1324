// The comparison of a presented instance token with ours. Whoever includes this links
// OpenSSL::Crypto.
#pragma once

#include <openssl/crypto.h>

#include <string_view>

namespace wintserve {

// Constant time in the contents, so that timing tells nothing about the token but its length, which
// is no secret.
inline bool TokensEqual(std::string_view ours, std::string_view presented) {
  return ours.size() == presented.size() &&
         CRYPTO_memcmp(ours.data(), presented.data(), ours.size()) == 0;
}

}  // namespace wintserve
