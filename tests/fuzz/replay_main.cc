// Runs a fuzz target over files: what libFuzzer's main does with a list of inputs, for builds
// without libFuzzer. Arguments: files, and directories whose files are taken.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "common/read_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace wintserve {
namespace {

std::vector<std::filesystem::path> FindInputs(int argc, char** argv) {
  std::vector<std::filesystem::path> inputs;
  for (int i = 1; i < argc; ++i) {
    if (!std::filesystem::is_directory(argv[i])) {
      inputs.emplace_back(argv[i]);
      continue;
    }
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
      inputs.push_back(entry.path());
    }
  }
  std::sort(inputs.begin(), inputs.end());
  return inputs;
}

int Main(int argc, char** argv) {
  const std::vector<std::filesystem::path> inputs = FindInputs(argc, argv);
  if (inputs.empty()) {
    std::fprintf(stderr, "usage: %s FILE|DIRECTORY...; found no input\n", argv[0]);
    return 2;
  }
  for (const auto& input : inputs) {
    const auto bytes = ReadFile(input);
    if (!bytes.ok()) {
      std::fprintf(stderr, "%s\n", std::string(bytes.status().message()).c_str());
      return 2;
    }
    // Named before it runs, since it may end the process.
    std::printf("%s\n", input.c_str());
    std::fflush(stdout);
    // Of exactly its size, so that a checker of addresses sees a read beyond it.
    const auto copy = std::make_unique<uint8_t[]>(bytes->size());
    if (!bytes->empty()) std::memcpy(copy.get(), bytes->data(), bytes->size());
    LLVMFuzzerTestOneInput(copy.get(), bytes->size());
  }
  std::printf("%zu inputs\n", inputs.size());
  return 0;
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::Main(argc, argv); }
