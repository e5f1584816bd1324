// API keys.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

namespace wintserve {

// Immutable; thread-safe. Keeps hashes, not keys.
class ApiKeys {
 public:
  // Empty strings are no keys.
  explicit ApiKeys(const std::vector<std::string>& keys);
  // True: no key is configured, everyone may come in.
  bool empty() const { return hashes_.empty(); }
  // `authorization`: the header's value, "Bearer KEY"; the word in any case. Takes the same time
  // whichever key it is, and however much of it is right.
  bool Accepts(std::string_view authorization) const;
  // Who that is, without holding the key: its SHA-256 in hexadecimal. Empty: no key is configured.
  // REQUIRES: empty() || Accepts(authorization).
  std::string DigestOf(std::string_view authorization) const;

 private:
  std::vector<std::array<unsigned char, 32>> hashes_;
};

// A cache salt that requests with another key cannot have.
std::string SaltOfKey(const std::string& key_digest, const std::string& cache_salt);

}  // namespace wintserve
