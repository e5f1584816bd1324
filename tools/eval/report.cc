#include "tools/eval/report.h"

#include <fcntl.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <string_view>
#include <vector>

#include "common/unique_fd.h"

namespace wintserve::eval {
namespace {

using nlohmann::ordered_json;

constexpr size_t kNumColumns = 6;
using Row = std::array<std::string, kNumColumns>;

// Columns of numbers stand at the right.
constexpr std::array<bool, kNumColumns> kIsNumber = {false, true, true, false, true, true};

// Of a name of a file, so that with the longest measure the table fits a terminal of 80 columns.
constexpr size_t kMostFileColumns = 19;

// Of UTF-8 on a terminal: from U+3000 on, most characters are two columns wide.
size_t ColumnsOf(std::string_view text) {
  size_t columns = 0;
  for (const char character : text) {
    const auto byte = static_cast<unsigned char>(character);
    if ((byte & 0xC0) != 0x80) columns += byte >= 0xE3 ? 2 : 1;
  }
  return columns;
}

// A name's end says what it is.
std::string ShownName(const std::string& file) {
  const std::string name = std::filesystem::path(file).filename().string();
  if (ColumnsOf(name) <= kMostFileColumns) return name;
  size_t begin = 0;
  while (ColumnsOf(std::string_view(name).substr(begin)) + 1 > kMostFileColumns) {
    do {
      ++begin;
    } while (begin < name.size() && (static_cast<unsigned char>(name[begin]) & 0xC0) == 0x80);
  }
  return "…" + name.substr(begin);
}

std::string ShownNumber(double value) {
  return value < 10000 ? fmt::format("{:.4f}", value) : fmt::format("{:.3e}", value);
}

// A row for each measure, the file below the task.
std::vector<Row> RowsOf(const Report& report) {
  std::vector<Row> rows = {{"task", "items", "tokens", "measure", "value", "± error"}};
  for (const TaskResult& task : report.tasks) {
    const size_t first = rows.size();
    rows.resize(first + std::max<size_t>(2, task.measures.size()));
    rows[first][0] = NameOf(task.options.kind);
    rows[first][1] = fmt::format("{}", task.num_items);
    rows[first][2] = task.num_tokens > 0 ? fmt::format("{}", task.num_tokens) : "-";
    rows[first + 1][0] = ShownName(task.options.file);
    for (size_t i = 0; i < task.measures.size(); ++i) {
      const Estimate& estimate = task.measures[i].estimate;
      const auto& error = estimate.standard_error;
      Row& row = rows[first + i];
      row[3] = task.measures[i].name;
      row[4] = ShownNumber(estimate.value);
      row[5] = error.has_value() ? ShownNumber(*error) : "-";
    }
  }
  return rows;
}

// A file is written beside its place and moved there; what a link leads to is replaced, not the
// link. What is no file, as a terminal or /dev/null, is written to.
struct JsonPlace {
  explicit JsonPlace(const std::string& path) : target(path), written(path) {
    std::error_code error;
    const auto status = std::filesystem::status(path, error);
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) return;
    const auto resolved = std::filesystem::weakly_canonical(path, error);
    if (!error) target = resolved;
    written = target.string() + ".partial";
  }
  bool is_renamed() const { return written != target; }

  std::filesystem::path target;
  std::filesystem::path written;
};

std::string UtcNow() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
}

}  // namespace

std::string Table(const Report& report) {
  const std::vector<Row> rows = RowsOf(report);
  std::array<size_t, kNumColumns> widths = {};
  for (const Row& row : rows) {
    for (size_t i = 0; i < kNumColumns; ++i) widths[i] = std::max(widths[i], ColumnsOf(row[i]));
  }
  std::string table;
  for (const Row& row : rows) {
    std::string line;
    for (size_t i = 0; i < kNumColumns; ++i) {
      const std::string padding(widths[i] - ColumnsOf(row[i]), ' ');
      line += (i == 0 ? "" : "  ") + (kIsNumber[i] ? padding + row[i] : row[i] + padding);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    table += line + "\n";
  }
  return table;
}

ordered_json ToJson(const Report& report, const Options& options) {
  ordered_json result;
  result["model"] = report.model.name;
  if (!options.model.empty()) result["checkpoint"] = options.model;
  if (!options.server.empty()) result["server"] = options.server;
  result["server_flags"] = options.server_flags;
  result["version"] = WINTSERVE_VERSION;
  result["date"] = UtcNow();
  result["tasks"] = ordered_json::array();
  for (const TaskResult& task : report.tasks) {
    ordered_json measures;
    for (const Measure& measure : task.measures) {
      const auto& error = measure.estimate.standard_error;
      measures[measure.name] = {
          {"value", measure.estimate.value},
          {"standard_error", error.has_value() ? ordered_json(*error) : ordered_json()}};
    }
    ordered_json entry = {{"task", NameOf(task.options.kind)},
                          {"file", task.options.file},
                          {"items", task.num_items},
                          {"tokens", task.num_tokens},
                          {"measures", measures},
                          {"seconds", task.seconds}};
    if (task.options.kind == TaskKind::kPerplexity)
      entry["context_tokens"] = options.context_tokens;
    if (task.options.kind == TaskKind::kExact) {
      entry["max_tokens"] = options.max_tokens;
      entry["exact_match"] = options.exact_match;
    }
    result["tasks"].push_back(std::move(entry));
  }
  return result;
}

absl::Status CheckJsonPlace(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return absl::InvalidArgumentError(
        fmt::format("--json: {} is a directory, must be a file", path));
  }
  const JsonPlace place(path);
  // What permissions promise, a file system need not keep.
  const UniqueFd file(::open(place.written.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666));
  if (file.valid()) {
    if (place.is_renamed()) ::unlink(place.written.c_str());
    return absl::OkStatus();
  }
  const int reason = errno;
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  return absl::InvalidArgumentError(fmt::format("--json: cannot write into {}: {}",
                                                parent.empty() ? "." : parent.string(),
                                                std::strerror(reason)));
}

absl::Status WriteJson(const ordered_json& report, const std::string& path) {
  const std::string text =
      report.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
  const JsonPlace place(path);
  std::FILE* const file = std::fopen(place.written.c_str(), "we");
  bool is_written =
      file != nullptr && std::fwrite(text.data(), 1, text.size(), file) == text.size();
  int reason = errno;
  if (file != nullptr && std::fclose(file) != 0 && is_written) {
    is_written = false;
    reason = errno;
  }
  if (is_written && place.is_renamed()) {
    is_written = std::rename(place.written.c_str(), place.target.c_str()) == 0;
    reason = errno;
  }
  if (is_written) return absl::OkStatus();
  if (place.is_renamed()) ::unlink(place.written.c_str());
  return absl::UnknownError(
      fmt::format("--json: cannot write {}: {}", path, std::strerror(reason)));
}

}  // namespace wintserve::eval
