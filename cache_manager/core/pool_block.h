// The name of a KV block in every message that leases or returns one.
#pragma once

#include <cstdint>

namespace wintserve {

// A block of the KV pool at one generation: a stale generation is refused by the cache manager.
struct PoolBlock {
  int32_t id = 0;
  uint32_t generation = 0;

  friend bool operator==(const PoolBlock&, const PoolBlock&) = default;
};

}  // namespace wintserve
