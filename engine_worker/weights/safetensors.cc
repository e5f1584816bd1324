#include "engine_worker/weights/safetensors.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "common/status_macros.h"
#include "engine_worker/config/json_object.h"
#include "engine_worker/config/model_files.h"

namespace wintserve {
namespace {

constexpr size_t kLengthBytes = 8;
constexpr size_t kMaxNameBytes = 512;
constexpr size_t kMaxDimensions = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's own library

struct TypeInfo {
  TensorType type;
  std::string_view name;
  int64_t bytes;
};
constexpr TypeInfo kTypes[] = {
    {TensorType::kBool, "BOOL", 1}, {TensorType::kU8, "U8", 1},   {TensorType::kI8, "I8", 1},
    {TensorType::kU16, "U16", 2},   {TensorType::kI16, "I16", 2}, {TensorType::kF16, "F16", 2},
    {TensorType::kBF16, "BF16", 2}, {TensorType::kU32, "U32", 4}, {TensorType::kI32, "I32", 4},
    {TensorType::kF32, "F32", 4},   {TensorType::kU64, "U64", 8}, {TensorType::kI64, "I64", 8},
    {TensorType::kF64, "F64", 8},
};

std::string AllTypeNames() {
  std::vector<std::string_view> names;
  for (const TypeInfo& info : kTypes) names.push_back(info.name);
  return fmt::format("{}", fmt::join(names, ", "));
}

const TypeInfo& InfoOf(TensorType type) { return kTypes[static_cast<size_t>(type)]; }

// Looks for a name that the outermost object has twice. Not by the callback of
// nlohmann::json::parse, whose time is quadratic in the number of members.
class DuplicateFinder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  const std::string& duplicate() const { return duplicate_; }

  bool key(string_t& name) override {
    if (depth_ == 1 && !names_.insert(name).second) duplicate_ = name;
    return true;
  }
  bool start_object(std::size_t /*elements*/) override { return Enter(1); }
  bool end_object() override { return Enter(-1); }
  bool start_array(std::size_t /*elements*/) override { return Enter(1); }
  bool end_array() override { return Enter(-1); }
  bool null() override { return true; }
  bool boolean(bool /*value*/) override { return true; }
  bool number_integer(number_integer_t /*value*/) override { return true; }
  bool number_unsigned(number_unsigned_t /*value*/) override { return true; }
  bool number_float(number_float_t /*value*/, const string_t& /*text*/) override { return true; }
  bool string(string_t& /*value*/) override { return true; }
  bool binary(binary_t& /*value*/) override { return true; }
  bool parse_error(std::size_t /*position*/, const std::string& /*token*/,
                   const nlohmann::json::exception& /*error*/) override {
    return false;
  }

 private:
  bool Enter(int levels) {
    depth_ += levels;
    return true;
  }

  int depth_ = 0;
  std::set<std::string> names_;
  std::string duplicate_;  // the last one
};

// An object with unique plain names, or an error without the file's name.
absl::StatusOr<nlohmann::json> ParseHeaderJson(std::string_view text) {
  absl::StatusOr<nlohmann::json> header = ParseJsonObject(text);
  if (!header.ok()) {
    return absl::DataLossError(
        fmt::format("the header is {}", std::string(header.status().message())));
  }
  for (const auto& [name, entry] : header->items()) {
    if (!IsPlainName(name)) return absl::DataLossError(NotAPlainName(name));
  }
  DuplicateFinder finder;
  nlohmann::json::sax_parse(text.begin(), text.end(), &finder);
  if (!finder.duplicate().empty()) {
    return absl::DataLossError(fmt::format("tensor {} is listed twice", finder.duplicate()));
  }
  return header;
}

// A list of a few whole numbers in 0 … 2^63-1.
std::optional<std::vector<int64_t>> ToSizes(const nlohmann::json& value) {
  if (!value.is_array() || value.size() > kMaxDimensions) return std::nullopt;
  std::vector<int64_t> sizes;
  for (const nlohmann::json& element : value) {
    if (!element.is_number_unsigned() || element.get<uint64_t>() > INT64_MAX) return std::nullopt;
    sizes.push_back(element.get<int64_t>());
  }
  return sizes;
}

// Number of bytes of a tensor; none if it does not fit 64 bits.
std::optional<int64_t> BytesOf(const TypeInfo& type, const std::vector<int64_t>& shape) {
  int64_t bytes = type.bytes;
  for (int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) return std::nullopt;
  }
  return bytes;
}

struct ParsedTensor {
  TensorView view;
  std::string error;
};

ParsedTensor ParseTensor(const nlohmann::json& entry, std::span<const uint8_t> data) {
  const auto error = [](std::string text) { return ParsedTensor{{}, std::move(text)}; };
  if (!entry.is_object()) return error("its header entry is not an object");
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!entry.contains(key)) return error(fmt::format("{} is missing", key));
  }
  const nlohmann::json& dtype = entry["dtype"];
  const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const TypeInfo& info) {
    return dtype.is_string() && dtype.get<std::string>() == info.name;
  });
  if (type == std::end(kTypes)) {
    return error(
        fmt::format("found dtype {}, expected one of {}", ShowJson(dtype), AllTypeNames()));
  }
  const auto shape = ToSizes(entry["shape"]);
  if (!shape) {
    return error(fmt::format("found shape {}, expected a list of at most {} whole numbers from 0",
                             ShowJson(entry["shape"]), kMaxDimensions));
  }
  const auto offsets = ToSizes(entry["data_offsets"]);
  if (!offsets || offsets->size() != 2 || (*offsets)[0] > (*offsets)[1]) {
    return error(fmt::format("found data_offsets {}, expected [begin, end]",
                             ShowJson(entry["data_offsets"])));
  }
  const auto [begin, end] = std::pair((*offsets)[0], (*offsets)[1]);
  if (end > static_cast<int64_t>(data.size())) {
    return error(
        fmt::format("found data_offsets [{}, {}] beyond the end of the file, expected "
                    "at most {} (is the file truncated?)",
                    begin, end, data.size()));
  }
  const auto bytes = BytesOf(*type, *shape);
  if (!bytes || *bytes != end - begin) {
    return error(fmt::format("found {} bytes, expected {} for {} [{}]", end - begin,
                             bytes ? std::to_string(*bytes) : "more than 2^63", type->name,
                             fmt::join(*shape, ", ")));
  }
  return {{type->type, *shape, data.subspan(begin, end - begin)}, ""};
}

// Of whole pages. An error would cost time or memory, never a wrong byte.
void Advise(std::span<const uint8_t> data, int advice) {
  if (data.empty()) return;
  static const auto kPageBytes = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const size_t before = reinterpret_cast<uintptr_t>(data.data()) % kPageBytes;
  ::madvise(const_cast<uint8_t*>(data.data()) - before, data.size() + before, advice);
}

}  // namespace

bool IsPlainName(std::string_view name) {
  return !name.empty() && name.size() <= kMaxNameBytes &&
         std::all_of(name.begin(), name.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

std::string NotAPlainName(std::string_view name) {
  return fmt::format("tensor {}: found a name of {} bytes, expected 1 to {} of printable ASCII",
                     ShowJson(name), name.size(), kMaxNameBytes);
}

std::string_view TensorTypeName(TensorType type) { return InfoOf(type).name; }
int64_t TensorTypeBytes(TensorType type) { return InfoOf(type).bytes; }

void DropPages(std::span<const uint8_t> data) {
  // Of a private mapping that nobody writes, this forgets nothing.
  Advise(data, MADV_DONTNEED);
}

void AdviseReading(std::span<const uint8_t> data, Reading reading) {
  Advise(data, reading == Reading::kSparse ? MADV_RANDOM : MADV_NORMAL);
}

SafetensorsFile::SafetensorsFile(SafetensorsFile&& other) noexcept
    : path_(std::move(other.path_)),
      bytes_(std::exchange(other.bytes_, {})),
      named_(std::move(other.named_)),
      header_bytes_(other.header_bytes_),
      tensors_(std::move(other.tensors_)) {}

SafetensorsFile::~SafetensorsFile() {
  if (!bytes_.empty()) ::munmap(const_cast<uint8_t*>(bytes_.data()), bytes_.size());
}

absl::Status SafetensorsFile::Corrupt(std::string_view message) const {
  return absl::DataLossError(fmt::format("{}: {}", path_.string(), message));
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::filesystem::path& path) {
  SafetensorsFile file;
  file.path_ = path;
  RETURN_IF_ERROR(file.Map());
  RETURN_IF_ERROR(file.ParseHeader());
  return file;
}

absl::Status SafetensorsFile::Map() {
  ASSIGN_OR_RETURN(const ModelFile file, OpenModelFile(path_));
  if (file.size_bytes < static_cast<int64_t>(kLengthBytes)) {
    return Corrupt(
        fmt::format("found {} bytes, expected a header (is the file truncated?)", file.size_bytes));
  }
  void* mapping = ::mmap(nullptr, file.size_bytes, PROT_READ, MAP_PRIVATE, file.fd.get(), 0);
  if (mapping == MAP_FAILED) {
    return Corrupt(fmt::format("cannot be mapped: {}", std::strerror(errno)));
  }
  bytes_ = {static_cast<const uint8_t*>(mapping), static_cast<size_t>(file.size_bytes)};
  named_ = NamedMapping(bytes_, path_);
  return absl::OkStatus();
}

absl::Status SafetensorsFile::ParseHeader() {
  uint64_t json_bytes = 0;
  std::memcpy(&json_bytes, bytes_.data(), kLengthBytes);
  const uint64_t available = bytes_.size() - kLengthBytes;
  if (json_bytes > std::min(available, kMaxHeaderBytes)) {
    return Corrupt(
        fmt::format("found a header length of {}, expected at most {} (is the file "
                    "truncated, or no safetensors file?)",
                    json_bytes, std::min(available, kMaxHeaderBytes)));
  }
  header_bytes_ = kLengthBytes + json_bytes;
  const absl::StatusOr<nlohmann::json> parsed =
      ParseHeaderJson({reinterpret_cast<const char*>(bytes_.data()) + kLengthBytes, json_bytes});
  if (!parsed.ok()) return Corrupt(std::string(parsed.status().message()));
  for (const auto& [name, entry] : parsed->items()) {
    if (name == "__metadata__") continue;
    ParsedTensor tensor = ParseTensor(entry, data());
    if (!tensor.error.empty()) return Corrupt(fmt::format("tensor {}: {}", name, tensor.error));
    tensors_.emplace(name, std::move(tensor.view));
  }
  return CheckTensorsCoverData();
}

// So no two share a byte, and none is cut off.
absl::Status SafetensorsFile::CheckTensorsCoverData() const {
  std::vector<std::pair<int64_t, std::map<std::string, TensorView, std::less<>>::const_iterator>>
      by_offset;
  for (auto it = tensors_.cbegin(); it != tensors_.cend(); ++it) {
    by_offset.emplace_back(it->second.data.data() - data().data(), it);
  }
  std::sort(by_offset.begin(), by_offset.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first, a.second->second.data.size()) <
           std::pair(b.first, b.second->second.data.size());
  });
  int64_t expected = 0;
  for (const auto& [offset, it] : by_offset) {
    if (offset != expected) {
      return Corrupt(
          fmt::format("tensor {}: found data at offset {}, expected {} where the tensor "
                      "before it ends",
                      it->first, offset, expected));
    }
    expected += static_cast<int64_t>(it->second.data.size());
  }
  if (expected != static_cast<int64_t>(data().size())) {
    return Corrupt(fmt::format("found {} bytes of data, expected {} as its tensors have",
                               data().size(), expected));
  }
  return absl::OkStatus();
}

}  // namespace wintserve
