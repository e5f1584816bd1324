#include "api_server/llm/model_digest.h"

#include <fmt/core.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>

namespace wintserve {

std::string ModelDigest(const std::string& model_path, const Tokenizer& tokenizer) {
  XXH3_state_t state;
  XXH3_128bits_reset(&state);
  // Every part begins with its length, so that no two lists of parts are one string of bytes.
  const auto add = [&state](const std::string& part) {
    const uint64_t size = part.size();
    XXH3_128bits_update(&state, &size, sizeof(size));
    XXH3_128bits_update(&state, part.data(), part.size());
  };
  const std::filesystem::path path = std::filesystem::path(model_path) / "config.json";
  std::error_code error;
  std::ifstream config;
  // What is no file (a pipe would wait for its writer) is the worker's to refuse.
  if (std::filesystem::is_regular_file(path, error)) config.open(path, std::ios::binary);
  add(std::string(std::istreambuf_iterator<char>(config), {}));
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) add(tokenizer.Bytes(id));
  const XXH128_hash_t digest = XXH3_128bits_digest(&state);
  return fmt::format("{:016x}{:016x}", digest.high64, digest.low64);
}

}  // namespace wintserve
