#include "api_server/http/auth.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"

namespace wintserve {

ApiKeys::ApiKeys(const std::vector<std::string>& keys) {
  for (const std::string& key : keys) {
    if (!key.empty()) hashes_.push_back(HashOf(key));
  }
}

ApiKeys::Hash ApiKeys::HashOf(std::string_view key) {
  Hash hash;
  SHA256(reinterpret_cast<const unsigned char*>(key.data()), key.size(), hash.data());
  return hash;
}

bool ApiKeys::Accepts(std::string_view authorization) const {
  constexpr std::string_view kScheme = "bearer ";
  const absl::string_view header(authorization.data(), authorization.size());
  if (!absl::StartsWithIgnoreCase(header, {kScheme.data(), kScheme.size()})) return false;
  const absl::string_view key = absl::StripAsciiWhitespace(header.substr(kScheme.size()));
  const Hash hash = HashOf({key.data(), key.size()});
  bool accepted = false;
  for (const Hash& known : hashes_) {
    accepted |= CRYPTO_memcmp(known.data(), hash.data(), hash.size()) == 0;
  }
  return accepted;
}

}  // namespace wintserve
