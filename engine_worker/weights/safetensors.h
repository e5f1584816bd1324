// One .safetensors file, mapped read-only and checked: a little-endian 64-bit header length, a JSON
// header, the tensors' bytes back to back.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/weights/unreadable_page.h"

namespace wintserve {

enum class TensorType {
  kBool,
  kU8,
  kI8,
  kU16,
  kI16,
  kF16,
  kBF16,
  kU32,
  kI32,
  kF32,
  kU64,
  kI64,
  kF64
};

// The format's own name: "BF16".
std::string_view TensorTypeName(TensorType type);
int64_t TensorTypeBytes(TensorType type);

// Whether a tensor may have this name: as it goes into messages, it is short and has no characters
// that move a terminal's cursor.
bool IsPlainName(std::string_view name);
// What is wrong with one that is not plain, without the file's name.
std::string NotAPlainName(std::string_view name);

// `data` may be unaligned: nothing in the format aligns a tensor to its element.
struct TensorView {
  TensorType type = TensorType::kU8;
  std::vector<int64_t> shape;
  std::span<const uint8_t> data;
};

// Mapped pages that were read count as this process's memory. Tells the system that these bytes
// will not be read again soon; if they are, they come from the file's cache or the file. Whole
// pages go, also where they hold the end of a neighbour. `data` lies in a SafetensorsFile.
// Threading: any, also while others read.
void DropPages(std::span<const uint8_t> data);

// Reads of `data` that follow are of single places (kSparse): the system then reads none of what
// lies behind them, which is megabytes on some machines; or of whole tensors (kWhole), as at first.
enum class Reading { kWhole, kSparse };
void AdviseReading(std::span<const uint8_t> data, Reading reading);

// Ownership: the mapping; views point into it.
// Threading: thread-safe after Open.
// A file that cannot be read after all, or is shortened meanwhile, ends the process with a line
// that names it (NamedMapping).
class SafetensorsFile {
 public:
  // NOT_FOUND: no such file. DATA_LOSS: truncated, or a header that is malformed, names a tensor
  // twice, or does not cover the data exactly. Errors name the file and the tensor.
  static absl::StatusOr<SafetensorsFile> Open(const std::filesystem::path& path);

  SafetensorsFile(SafetensorsFile&& other) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) = delete;
  ~SafetensorsFile();

  const std::filesystem::path& path() const { return path_; }
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }
  int64_t size_bytes() const { return static_cast<int64_t>(bytes_.size()); }
  // The length field and the JSON; then the rest of the file.
  std::span<const uint8_t> header() const { return bytes_.first(header_bytes_); }
  std::span<const uint8_t> data() const { return bytes_.subspan(header_bytes_); }

 private:
  SafetensorsFile() = default;
  absl::Status Map();
  absl::Status ParseHeader();
  absl::Status CheckTensorsCoverData() const;  // exactly
  // `message` prefixed with the file's path.
  absl::Status Corrupt(std::string_view message) const;

  std::filesystem::path path_;
  std::span<const uint8_t> bytes_;
  NamedMapping named_;
  size_t header_bytes_ = 0;
  std::map<std::string, TensorView, std::less<>> tensors_;
};

}  // namespace wintserve
