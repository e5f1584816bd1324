#include "api_server/openai/ids.h"

#include <fmt/format.h>
#include <openssl/rand.h>

#include <array>
#include <cstdint>
#include <string_view>

#include "common/check.h"

namespace wintserve {

std::string NewUuid() {
  std::array<unsigned char, 16> bytes;
  CHECK(RAND_bytes(bytes.data(), bytes.size()) == 1, "no random bytes from the system");
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const std::string hex = fmt::format("{:02x}", fmt::join(bytes, ""));
  const std::string_view view = hex;
  return fmt::format("{}-{}-{}-{}-{}", view.substr(0, 8), view.substr(8, 4), view.substr(12, 4),
                     view.substr(16, 4), view.substr(20));
}

}  // namespace wintserve
