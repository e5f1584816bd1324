// Writes down what a model computes for given token ids, on one device:
//
//   model_outputs --model DIR --device cpu|cuda [--rounding unrounded|fastdeploy]
//                 [--tensor-parallel-size 1|2|4] --input FILE.jsonl --output DIR
//
// A line of the input is {"ids": [...]}: logits of every position, or {"ids": [...], "generate":
// N}: a greedy continuation of up to N ids. The output directory gets
//   logits.f32     float32 [positions of the first kind of line, vocab_size], in the input's order
//   outputs.json   vocab_size, the backend's name, the continuations, the seconds that each took
// tests/accuracy/outputs.py reads both. Exit: 0, or 1 with one line that says why not.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/log.h"
#include "common/status_macros.h"
#include "tests/accuracy/model_under_test.h"

namespace wintserve::accuracy {
namespace {

using nlohmann::json;

struct Input {
  std::vector<TokenIds> sequences;
  std::vector<GreedyRequest> requests;
};

absl::StatusOr<Input> ReadInput(const std::string& path) {
  std::ifstream file(path);
  if (!file.good()) return absl::NotFoundError(fmt::format("cannot read {}", path));
  Input input;
  int number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    const json item = json::parse(line, nullptr, /*allow_exceptions=*/false);
    const bool is_ids = item.is_object() && item.contains("ids") && item["ids"].is_array() &&
                        !item["ids"].empty() &&
                        std::all_of(item["ids"].begin(), item["ids"].end(),
                                    [](const json& id) { return id.is_number_integer(); });
    if (!is_ids) {
      return absl::InvalidArgumentError(
          fmt::format("{}:{}: expected an object with \"ids\", a list of integers", path, number));
    }
    TokenIds ids = item["ids"];
    if (item.contains("generate")) {
      input.requests.push_back({std::move(ids), item["generate"].get<int>()});
    } else {
      input.sequences.push_back(std::move(ids));
    }
  }
  return input;
}

// A file of rows that arrive in any order.
class LogitsFile {
 public:
  LogitsFile(const std::filesystem::path& path, const std::vector<TokenIds>& sequences)
      : path_(path), file_(path, std::ios::binary | std::ios::trunc) {
    for (const TokenIds& ids : sequences) {
      first_row_.push_back(num_rows_);
      num_rows_ += ids.size();
    }
  }
  void Write(size_t sequence, size_t position, std::span<const float> logits) {
    const size_t row = first_row_[sequence] + position;
    file_.seekp(static_cast<std::streamoff>(row * logits.size_bytes()));
    file_.write(reinterpret_cast<const char*>(logits.data()),
                static_cast<std::streamsize>(logits.size_bytes()));
  }
  absl::Status Close() {
    file_.close();
    if (file_) return absl::OkStatus();
    return absl::UnknownError(fmt::format("cannot write {}", path_.string()));
  }
  size_t num_rows() const { return num_rows_; }

 private:
  const std::filesystem::path path_;
  std::ofstream file_;
  std::vector<size_t> first_row_;
  size_t num_rows_ = 0;
};

class Stopwatch {
 public:
  double Seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

struct Options {
  ModelUnderTestOptions model;
  std::string input;
  std::string output;
  int32_t stop_id = 2;
};

// What the other ranks do while rank 0 writes down the results.
absl::Status Follow(const Options& options) {
  ASSIGN_OR_RETURN(const Input input, ReadInput(options.input));
  ASSIGN_OR_RETURN(const std::unique_ptr<ModelUnderTest> model,
                   ModelUnderTest::Load(options.model));
  const auto no_logits = [](size_t, size_t, std::span<const float>) {};
  RETURN_IF_ERROR(model->TeacherForce(input.sequences, no_logits).status());
  return model->Greedy(input.requests, options.stop_id).status();
}

absl::Status Run(const Options& options) {
  ASSIGN_OR_RETURN(const Input input, ReadInput(options.input));
  std::error_code error;
  std::filesystem::create_directories(options.output, error);
  if (error) return absl::UnknownError(fmt::format("{}: {}", options.output, error.message()));
  const std::filesystem::path directory = options.output;

  const Stopwatch load_time;
  ASSIGN_OR_RETURN(const std::unique_ptr<ModelUnderTest> model,
                   ModelUnderTest::Load(options.model));
  for (const TokenIds& ids : input.sequences) {
    for (const int32_t id : ids) {
      if (id >= 0 && id < model->vocab_size()) continue;
      return absl::InvalidArgumentError(fmt::format("{}: id {}; this model has 0 … {}",
                                                    options.input, id, model->vocab_size() - 1));
    }
  }
  json report = {{"backend", model->backend_name()},
                 {"vocab_size", model->vocab_size()},
                 {"load_seconds", load_time.Seconds()}};
  const Stopwatch teacher_forced_time;
  LogitsFile logits(directory / "logits.f32", input.sequences);
  ASSIGN_OR_RETURN(const int num_same,
                   model->TeacherForce(input.sequences, [&](size_t sequence, size_t position,
                                                            std::span<const float> row) {
                     logits.Write(sequence, position, row);
                   }));
  RETURN_IF_ERROR(logits.Close());
  report["teacher_forced"] = {{"sequences", input.sequences.size()},
                              {"positions", logits.num_rows()},
                              {"same_bits_as_whole_prompts", num_same},
                              {"seconds", teacher_forced_time.Seconds()}};
  const Stopwatch greedy_time;
  ASSIGN_OR_RETURN(const std::vector<TokenIds> greedy,
                   model->Greedy(input.requests, options.stop_id));
  report["greedy"] = greedy;
  report["greedy_seconds"] = greedy_time.Seconds();
  std::ofstream file(directory / "outputs.json");
  file << report.dump() << "\n";
  file.close();
  return file ? absl::OkStatus()
              : absl::UnknownError(fmt::format("cannot write {}/outputs.json", options.output));
}

void ExitUnlessOk(const absl::Status& status) {
  if (status.ok()) return;
  fmt::print(stderr, "model_outputs: {}\n", std::string(status.message()));
  std::_Exit(1);  // other ranks may be waiting for this one
}

void RunRanks(Options options, int world_size) {
  if (world_size == 1) {
    ExitUnlessOk(Run(options));
    return;
  }
  options.model.meeting_place = std::make_shared<MeetingPlace>(world_size);
  std::vector<std::thread> others;
  for (int rank = 1; rank < world_size; ++rank) {
    others.emplace_back([rank, options]() mutable {
      options.model.rank = rank;
      ExitUnlessOk(Follow(options));
    });
  }
  ExitUnlessOk(Run(options));
  for (std::thread& other : others) other.join();
}

int Main(int argc, char** argv) {
  Options options;
  int world_size = 1;
  options.model.num_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  std::string rounding = "unrounded";
  CLI::App app("Logits of every position and greedy continuations of given token ids");
  app.add_option("--model", options.model.model_dir)->required();
  app.add_option("--device", options.model.device)->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--rounding", rounding, "Of the CPU's decoded weights")
      ->check(CLI::IsMember({"unrounded", "fastdeploy"}));
  app.add_option("--threads", options.model.num_threads, "Of the CPU")->check(CLI::Range(1, 1024));
  app.add_option("--tensor-parallel-size", world_size)->check(CLI::IsMember({1, 2, 4}));
  app.add_option("--stop-id", options.stop_id, "Ends a greedy continuation");
  app.add_option("--input", options.input)->required();
  app.add_option("--output", options.output)->required();
  CLI11_PARSE(app, argc, argv);
  options.model.rounding = rounding == "fastdeploy" ? kernels::WeightRounding::kFastDeploy
                                                    : kernels::WeightRounding::kUnrounded;
  InitLog("model_outputs", "warning");
  RunRanks(std::move(options), world_size);
  return 0;
}

}  // namespace
}  // namespace wintserve::accuracy

int main(int argc, char** argv) { return wintserve::accuracy::Main(argc, argv); }
