// Runs a fuzz target over files, for builds without libFuzzer: first each as it is, then changed at
// random for some seconds. Changes know nothing of the code they reach, unlike libFuzzer's, but
// every build makes them.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/read_file.h"

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace wintserve {
namespace {

std::vector<std::filesystem::path> FindInputs(const std::vector<std::string>& arguments) {
  std::vector<std::filesystem::path> inputs;
  for (const std::string& argument : arguments) {
    if (!std::filesystem::is_directory(argument)) {
      inputs.emplace_back(argument);
      continue;
    }
    for (const auto& entry : std::filesystem::directory_iterator(argument)) {
      inputs.push_back(entry.path());
    }
  }
  std::sort(inputs.begin(), inputs.end());
  return inputs;
}

void Run(const std::string& input) {
  // Of exactly its size, so that a checker of addresses sees a read beyond it.
  const auto copy = std::make_unique<uint8_t[]>(input.size());
  if (!input.empty()) std::memcpy(copy.get(), input.data(), input.size());
  LLVMFuzzerTestOneInput(copy.get(), input.size());
}

// Makes inputs of `corpus`, in an order that the seed gives.
class Mutator {
 public:
  Mutator(std::vector<std::string> corpus, uint64_t seed)
      : corpus_(std::move(corpus)), random_(seed) {}

  std::string Next() {
    std::string input = corpus_[Below(corpus_.size())];
    for (size_t changes = 1 + Below(4); changes > 0; --changes) Change(input);
    if (input.size() > kMaxBytes) input.resize(kMaxBytes);
    return input;
  }

 private:
  static constexpr size_t kMaxBytes = 64 << 10;
  // Edges of numbers, of UTF-8, of JSON and of HTTP.
  static constexpr char kBytes[] = {0,    1,   '\x7f', '\x80', '\xff', '\xc0', '"',
                                    '\\', '{', '[',    '-',    '9',    '\r',   '\n'};

  size_t Below(size_t count) {
    return std::uniform_int_distribution<size_t>(0, count - 1)(random_);
  }

  // A part of `from`, of up to 64 bytes.
  std::string PartOf(const std::string& from) {
    return from.empty() ? "" : from.substr(Below(from.size()), 1 + Below(64));
  }

  void Change(std::string& input) {
    const size_t at = Below(input.size() + 1);
    switch (Below(5)) {
      case 0:
        if (at < input.size()) input[at] ^= static_cast<char>(1 << Below(8));
        break;
      case 1:
        if (at < input.size()) input[at] = kBytes[Below(sizeof(kBytes))];
        break;
      case 2:
        input.erase(at, 1 + Below(64));
        break;
      case 3:
        input.insert(at, PartOf(input));
        break;
      default:
        input.replace(at, Below(64), PartOf(corpus_[Below(corpus_.size())]));
    }
  }

  std::vector<std::string> corpus_;
  std::mt19937_64 random_;
};

int Main(int argc, char** argv) {
  LLVMFuzzerInitialize(&argc, &argv);
  CLI::App app("Runs a fuzz target over files, then over changed ones");
  std::vector<std::string> arguments;
  double seconds = 0;
  uint64_t seed = std::random_device()();
  app.add_option("inputs", arguments, "files, and directories whose files are taken")->required();
  app.add_option("--mutate-for", seconds, "seconds to run changed inputs")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--seed", seed, "of the changes; printed when they begin");
  CLI11_PARSE(app, argc, argv);

  std::vector<std::string> corpus;
  for (const auto& path : FindInputs(arguments)) {
    auto bytes = ReadFile(path);
    if (!bytes.ok()) {
      std::fprintf(stderr, "%s\n", std::string(bytes.status().message()).c_str());
      return 2;
    }
    // Named before it runs, since it may end the process.
    std::printf("%s\n", path.c_str());
    std::fflush(stdout);
    Run(*bytes);
    corpus.push_back(*std::move(bytes));
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "no input in %s\n", arguments.front().c_str());
    return 2;
  }
  std::printf("%zu inputs; changed ones with --seed %llu\n", corpus.size(),
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  Mutator mutator(std::move(corpus), seed);
  size_t num_mutants = 0;
  for (; Clock::now() < end; ++num_mutants) Run(mutator.Next());
  std::printf("%zu changed inputs\n", num_mutants);
  return 0;
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::Main(argc, argv); }
