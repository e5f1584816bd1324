// Prints one valid input of a target that only C++ can make; see tests/fuzz/make_corpus.
#include <unistd.h>

#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "common/check.h"
#include "common/config/instance.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "engine_worker/weights/layout.h"

namespace wintserve {
namespace {

struct Shard {
  nlohmann::json header = nlohmann::json::object();
  size_t num_bytes = 0;
};

// The small WINT2 checkpoint of the tests in two shards, as checkpoint_files.h reads it.
std::string CheckpointSeed() {
  const testing::TestTensors tensors =
      testing::MakeTensors(testing::SmallWint2Config(), testing::TestLayout::kPaddle, /*seed=*/1);
  std::map<std::string, Shard> shards;
  nlohmann::json weight_map;
  size_t count = 0;
  for (const auto& [name, tensor] : tensors) {
    const bool is_first_half = 2 * count++ < tensors.size();
    const std::string file = is_first_half ? "model-1.safetensors" : "model-2.safetensors";
    Shard& shard = shards[file];
    const size_t end = shard.num_bytes + tensor.bytes.size();
    shard.header[name] = {
        {"dtype", tensor.type}, {"shape", tensor.shape}, {"data_offsets", {shard.num_bytes, end}}};
    shard.num_bytes = end;
    weight_map[name] = file;
  }
  std::string text = "@model.safetensors.index.json\n";
  text += nlohmann::json{{"weight_map", weight_map}}.dump();
  for (const auto& [file, shard] : shards) {
    text += fmt::format("\n@{} {}\n{}", file, shard.num_bytes, shard.header.dump());
  }
  return text;
}

// A small bfloat16 model for two ranks, with its config.json.
std::string RanksSeed() {
  ModelConfig config = testing::SmallConfig();
  config.num_layers = 2;
  config.moe_layer_end = 1;
  std::string text = "@config.json\n" + nlohmann::json::parse(testing::ConfigJson(config)).dump();
  for (int rank = 0; rank < 2; ++rank) {
    Shard shard;
    for (const auto& [name, tensor] : testing::MakeTensors(
             ConfigOfShard(config, 2), testing::TestLayout::kHuggingFace, /*seed=*/1)) {
      const size_t end = shard.num_bytes + tensor.bytes.size();
      shard.header[name] = {{"dtype", tensor.type},
                            {"shape", tensor.shape},
                            {"data_offsets", {shard.num_bytes, end}}};
      shard.num_bytes = end;
    }
    text += fmt::format("\n@rank{}/model.safetensors {}\n{}", rank, shard.num_bytes,
                        shard.header.dump());
  }
  return text;
}

std::string InstanceSeed() {
  Instance instance;
  instance.options.model = "models/poet";
  instance.token = std::string(32, 't');
  instance.runtime_dir = "/run/wintserve";
  const auto fd = WriteInstance(instance);
  CHECK(fd.ok(), "{}", fd.status().ToString());
  std::string text(1 << 16, '\0');
  const ssize_t size = ::pread(fd->get(), text.data(), text.size(), 0);
  CHECK(size > 0);
  text.resize(static_cast<size_t>(size));
  return text;
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  if (name != "checkpoint" && name != "ranks" && name != "instance") {
    std::fprintf(stderr, "usage: %s checkpoint|ranks|instance\n", argv[0]);
    return 2;
  }
  const std::string seed = name == "checkpoint" ? wintserve::CheckpointSeed()
                           : name == "ranks"    ? wintserve::RanksSeed()
                                                : wintserve::InstanceSeed();
  std::fwrite(seed.data(), 1, seed.size(), stdout);
  return 0;
}
