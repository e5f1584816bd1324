#include "common/mapped_memory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

#include "absl/status/status.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr int kSizeSeals = F_SEAL_GROW | F_SEAL_SHRINK;

// At `place`, which is replaced, or where the kernel likes.
absl::StatusOr<void*> Map(int fd, int64_t size_bytes, void* place = nullptr) {
  const int flags = MAP_SHARED | (place == nullptr ? 0 : MAP_FIXED);
  void* data = ::mmap(place, size_bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (data == MAP_FAILED) {
    return absl::ErrnoToStatus(errno,
                               fmt::format("cannot map {} bytes of shared memory", size_bytes));
  }
  ::madvise(data, size_bytes,
            MADV_DONTDUMP);  // a core file must not hold every request's keys and values
  return data;
}

// Whether it is what Create makes, of this size.
absl::Status CheckMemfd(int fd, int64_t size_bytes) {
  struct stat info = {};
  if (::fstat(fd, &info) != 0) return absl::ErrnoToStatus(errno, "fstat of shared memory");
  if (info.st_size != size_bytes) {
    return absl::InvalidArgumentError(
        fmt::format("shared memory has {} bytes, expected {}", info.st_size, size_bytes));
  }
  // Without the seals the peer could shrink it later and turn our next access into SIGBUS.
  if ((::fcntl(fd, F_GET_SEALS) & kSizeSeals) != kSizeSeals) {
    return absl::InvalidArgumentError("shared memory is not sealed against resizing");
  }
  return absl::OkStatus();
}

// One range of addresses with nothing behind them.
absl::StatusOr<void*> Reserve(int64_t size_bytes) {
  void* data = ::mmap(nullptr, size_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      /*fd=*/-1, 0);
  if (data == MAP_FAILED) {
    return absl::ErrnoToStatus(errno, fmt::format("cannot reserve {} bytes", size_bytes));
  }
  return data;
}

}  // namespace

absl::StatusOr<MappedMemory> MappedMemory::Create(const std::string& debug_name,
                                                  int64_t size_bytes) {
  MappedMemory memory;
  memory.fd_.Reset(::memfd_create(debug_name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory.fd_.valid()) return absl::ErrnoToStatus(errno, "memfd_create");
  if (::ftruncate(memory.fd(), size_bytes) != 0) {
    return absl::ErrnoToStatus(errno,
                               fmt::format("cannot size shared memory to {} bytes", size_bytes));
  }
  if (::fcntl(memory.fd(), F_ADD_SEALS, kSizeSeals) != 0) {
    return absl::ErrnoToStatus(errno, "cannot seal shared memory");
  }
  ASSIGN_OR_RETURN(memory.data_, Map(memory.fd(), size_bytes));
  memory.size_bytes_ = size_bytes;
  return memory;
}

absl::StatusOr<MappedMemory> MappedMemory::FromFd(UniqueFd fd, int64_t size_bytes) {
  RETURN_IF_ERROR(CheckMemfd(fd.get(), size_bytes));
  MappedMemory memory;
  ASSIGN_OR_RETURN(memory.data_, Map(fd.get(), size_bytes));
  memory.fd_ = std::move(fd);
  memory.size_bytes_ = size_bytes;
  return memory;
}

absl::StatusOr<MappedMemory> MappedMemory::FromParts(SharedMemory shared) {
  if (shared.kind != SharedMemory::Kind::kHost) {
    return absl::InvalidArgumentError("memory of a GPU cannot be mapped into the host's");
  }
  if (shared.parts.size() == 1) return FromFd(std::move(shared.parts[0].fd), shared.size_bytes);
  const int64_t page_bytes = ::sysconf(_SC_PAGESIZE);
  int64_t size_bytes = 0;
  for (const SharedMemory::Part& part : shared.parts) {
    RETURN_IF_ERROR(CheckMemfd(part.fd.get(), part.size_bytes));
    if (size_bytes % page_bytes != 0) {
      return absl::InvalidArgumentError(
          fmt::format("a part of shared memory would begin at byte {}, inside a page", size_bytes));
    }
    size_bytes += part.size_bytes;
  }
  if (size_bytes != shared.size_bytes || size_bytes == 0) {
    return absl::InvalidArgumentError(
        fmt::format("{} parts of shared memory have {} bytes, expected {}", shared.parts.size(),
                    size_bytes, shared.size_bytes));
  }
  MappedMemory memory;
  ASSIGN_OR_RETURN(memory.data_, Reserve(size_bytes));
  memory.size_bytes_ = size_bytes;
  auto* place = static_cast<char*>(memory.data_);
  for (const SharedMemory::Part& part : shared.parts) {
    RETURN_IF_ERROR(Map(part.fd.get(), part.size_bytes, place).status());
    place += part.size_bytes;
  }
  return memory;
}

MappedMemory::MappedMemory(MappedMemory&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      size_bytes_(std::exchange(other.size_bytes_, 0)) {}

MappedMemory& MappedMemory::operator=(MappedMemory&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

MappedMemory::~MappedMemory() {
  if (data_ != nullptr) ::munmap(data_, size_bytes_);
}

}  // namespace wintserve
