// How entries are found: hashes of a chain of token blocks. Never what they are compared by.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

namespace wintserve {

struct Hash128 {
  uint64_t low = 0;
  uint64_t high = 0;

  friend bool operator==(const Hash128&, const Hash128&) = default;
  template <typename H>
  friend H AbslHashValue(H state, const Hash128& hash) {
    return H::combine(std::move(state), hash.low, hash.high);
  }
};

// The hash of a block from its parent's hash and its token ids.
using ChainHash = Hash128 (*)(const Hash128& parent, std::span<const int32_t> tokens);

// XXH3-128 of the parent's hash followed by the token ids.
Hash128 Xxh3ChainHash(const Hash128& parent, std::span<const int32_t> tokens);

// SHA-256 of (root_seed, salt): the identity of a chain's root.
using RootDigest = std::array<uint8_t, 32>;
RootDigest DigestOfRoot(const std::string& root_seed, const std::string& salt);
// Where the chain of hashes below that root starts.
Hash128 HashOfRoot(const RootDigest& digest);

}  // namespace wintserve
