#include "api_server/http/auth.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace wintserve {
namespace {

using Hash = std::array<unsigned char, 32>;

Hash Sha256(std::string_view text) {
  Hash hash;
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), hash.data());
  return hash;
}

std::string ToHex(const Hash& hash) {
  return absl::BytesToHexString({reinterpret_cast<const char*>(hash.data()), hash.size()});
}

// What stands behind "Bearer"; empty: nothing.
std::string_view KeyIn(std::string_view authorization) {
  constexpr std::string_view kScheme = "bearer ";
  const absl::string_view header(authorization.data(), authorization.size());
  if (!absl::StartsWithIgnoreCase(header, {kScheme.data(), kScheme.size()})) return {};
  const absl::string_view key = absl::StripAsciiWhitespace(header.substr(kScheme.size()));
  return {key.data(), key.size()};
}

}  // namespace

ApiKeys::ApiKeys(const std::vector<std::string>& keys) {
  for (const std::string& key : keys) {
    if (!key.empty()) hashes_.push_back(Sha256(key));
  }
}

bool ApiKeys::Accepts(std::string_view authorization) const {
  const Hash hash = Sha256(KeyIn(authorization));
  bool accepted = false;
  for (const Hash& known : hashes_) {
    accepted |= CRYPTO_memcmp(known.data(), hash.data(), hash.size()) == 0;
  }
  return accepted;
}

std::string ApiKeys::DigestOf(std::string_view authorization) const {
  return empty() ? "" : ToHex(Sha256(KeyIn(authorization)));
}

std::string SaltOfKey(const std::string& key_digest, const std::string& cache_salt) {
  // The digest's length is fixed, so no two pairs make the same text.
  return ToHex(Sha256(absl::StrCat("cache salt of ", key_digest, ":", cache_salt)));
}

}  // namespace wintserve
