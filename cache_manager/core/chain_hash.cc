#include "cache_manager/core/chain_hash.h"

#include <openssl/sha.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstring>

#include "absl/container/inlined_vector.h"

namespace wintserve {

Hash128 Xxh3ChainHash(const Hash128& parent, std::span<const int32_t> tokens) {
  absl::InlinedVector<char, sizeof(parent) + 64 * sizeof(int32_t)> bytes(sizeof(parent) +
                                                                         tokens.size_bytes());
  std::memcpy(bytes.data(), &parent, sizeof(parent));
  if (!tokens.empty()) {
    std::memcpy(bytes.data() + sizeof(parent), tokens.data(), tokens.size_bytes());
  }
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  return {hash.low64, hash.high64};
}

RootDigest DigestOfRoot(const std::string& root_seed, const std::string& salt) {
  // The length tells ("ab", "c") from ("a", "bc").
  const uint64_t seed_bytes = root_seed.size();
  std::string bytes(reinterpret_cast<const char*>(&seed_bytes), sizeof(seed_bytes));
  bytes += root_seed;
  bytes += salt;
  RootDigest digest;
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), digest.data());
  return digest;
}

Hash128 HashOfRoot(const RootDigest& digest) {
  Hash128 hash;
  std::memcpy(&hash, digest.data(), sizeof(hash));
  return hash;
}

}  // namespace wintserve
