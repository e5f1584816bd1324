// What becomes of a mapped file that cannot be read after all: because it was shortened, or its
// disk fails. The system says so by a signal (SIGBUS) at the read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>

namespace wintserve {

// While it lives, a read of `bytes` that fails ends the process: kExitCheckpoint, after a line on
// stderr that names `path`.
// The first one installs the handler. SIGBUS for any other reason is left to whoever had it before:
// by default it kills the process.
// Threading: any.
class NamedMapping {
 public:
  NamedMapping() = default;  // of nothing
  NamedMapping(std::span<const uint8_t> bytes, const std::filesystem::path& path);
  NamedMapping(NamedMapping&& other) noexcept;
  NamedMapping& operator=(NamedMapping&& other) noexcept;
  ~NamedMapping();

 private:
  struct Place;
  friend struct MappingPlaces;
  Place* place_ = nullptr;
};

}  // namespace wintserve
