#include "tools/eval/report.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <vector>

namespace wintserve::eval {
namespace {

using nlohmann::ordered_json;

constexpr size_t kNumColumns = 7;
using Row = std::array<std::string, kNumColumns>;

// Columns of numbers stand at the right.
constexpr std::array<bool, kNumColumns> kIsNumber = {false, false, true, true, false, true, true};

// Of UTF-8 on a terminal: from U+3000 on, most characters are two columns wide.
size_t ColumnsOf(const std::string& text) {
  size_t columns = 0;
  for (const char character : text) {
    const auto byte = static_cast<unsigned char>(character);
    if ((byte & 0xC0) != 0x80) columns += byte >= 0xE3 ? 2 : 1;
  }
  return columns;
}

std::vector<Row> RowsOf(const Report& report) {
  std::vector<Row> rows = {{"task", "file", "items", "tokens", "measure", "value", "± error"}};
  for (const TaskResult& task : report.tasks) {
    for (const Measure& measure : task.measures) {
      const auto& error = measure.estimate.standard_error;
      const bool is_first = &measure == &task.measures.front();
      const auto once = [is_first](const std::string& text) {
        return is_first ? text : std::string();
      };
      rows.push_back({once(NameOf(task.options.kind)),
                      once(std::filesystem::path(task.options.file).filename().string()),
                      once(fmt::format("{}", task.num_items)),
                      once(task.num_tokens > 0 ? fmt::format("{}", task.num_tokens) : "-"),
                      measure.name, fmt::format("{:.4f}", measure.estimate.value),
                      error.has_value() ? fmt::format("{:.4f}", *error) : "-"});
    }
  }
  return rows;
}

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
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  const std::string directory = parent.empty() ? "." : parent.string();
  // With the slash a file is not taken for a directory.
  if (::access((directory + "/").c_str(), W_OK) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("--json: cannot write into {}: {}", directory, std::strerror(errno)));
}

absl::Status WriteJson(const ordered_json& report, const std::string& path) {
  const std::string temporary = path + ".partial";
  std::ofstream file(temporary, std::ios::trunc);
  file << report.dump(1, ' ', false, ordered_json::error_handler_t::replace) << "\n";
  file.close();
  std::error_code error;
  if (file) std::filesystem::rename(temporary, path, error);
  if (file && !error) return absl::OkStatus();
  std::filesystem::remove(temporary, error);
  return absl::UnknownError(fmt::format("--json: cannot write {}", path));
}

}  // namespace wintserve::eval
