// Shared memory without a name: a sealed memfd and its mapping.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/shared_memory.h"
#include "common/unique_fd.h"

namespace wintserve {

// Owns the mapping and a descriptor of its memfd. Move-only; unmaps and closes on destruction.
class MappedMemory {
 public:
  // A memfd of size_bytes zero bytes, sealed against growing and shrinking. debug_name shows in
  // /proc.
  static absl::StatusOr<MappedMemory> Create(const std::string& debug_name, int64_t size_bytes);
  // Maps a memfd made by Create in another process. INVALID_ARGUMENT: wrong size, or not sealed.
  static absl::StatusOr<MappedMemory> FromFd(UniqueFd fd, int64_t size_bytes);
  // Maps memory of the host, its parts one behind the other. INVALID_ARGUMENT: a GPU's, or a part
  // of the wrong size, not sealed, or that ends inside a page and is not the last.
  static absl::StatusOr<MappedMemory> FromParts(SharedMemory shared);

  MappedMemory() = default;
  MappedMemory(MappedMemory&& other) noexcept;
  MappedMemory& operator=(MappedMemory&& other) noexcept;
  ~MappedMemory();

  void* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }
  int fd() const { return fd_.get(); }  // -1: mapped from several parts

 private:
  UniqueFd fd_;
  void* data_ = nullptr;
  int64_t size_bytes_ = 0;
};

}  // namespace wintserve
