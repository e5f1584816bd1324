// One layer of random weights in a published model's shapes, quantised by the program, then loaded
// by 1, 2 and 4 ranks that must agree. Its first argument is the program; --large: the published
// shapes instead of a small one; --calibrate: a layer of the 300B's shape with calibration. Of a
// large layer the environment may set EXPERTS, CALIBRATION_TOKENS, SWEEPS and THREADS.
#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <thread>

#include "api_server/text/tokenizer.h"
#include "engine_worker/model/ernie45.h"
#include "engine_worker/model/thread_group.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/formats/bf16.h"
#include "tools/quantizer/make_quantizer.h"
#include "tools/quantizer/output/output_test_util.h"
#include "tools/quantizer/output/tensor_plan.h"

namespace wintserve::quantizer {
namespace {

using testing::TempDir;

std::string g_program;          // NOLINT: set once, in main
bool g_large = false;           // NOLINT
bool g_calibrate = false;       // NOLINT
constexpr int kNumTokens = 12;  // of one prompt
constexpr int kBlocks = 4;

struct Shape {
  const char* name;
  bool is_large;
  int hidden, heads, kv_heads, head_dim, width, num_experts, top_k, num_shared;
};

// A number of the environment, for the large layers.
int64_t Setting(const char* name, int64_t otherwise, int64_t least = 1) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  int64_t value = 0;
  const char* const end = text + std::strlen(text);
  const auto [rest, error] = std::from_chars(text, end, value);
  CHECK(error == std::errc() && rest == end && value >= least,
        "{} is '{}', must be a number, at least {}", name, text, least);
  return value;
}

ModelConfig ConfigOf(const Shape& shape) {
  ModelConfig config = wintserve::testing::SmallConfig();
  config.vocab_size = 512;
  config.hidden_size = shape.hidden;
  config.num_layers = 1;
  config.num_heads = shape.heads;
  config.num_kv_heads = shape.kv_heads;
  config.head_dim = shape.head_dim;
  config.intermediate_size = 256;
  config.num_experts = shape.num_experts;
  if (shape.is_large) {
    config.num_experts = static_cast<int>(Setting("EXPERTS", shape.num_experts));
  }
  config.num_experts_per_token = std::min(shape.top_k, config.num_experts);
  config.moe_intermediate_size = shape.width;
  config.num_shared_experts = shape.num_shared;
  config.moe_layer_start = 0;
  config.moe_layer_end = 0;
  return config;
}

// Normally distributed bf16 weights from a table of quantiles.
class RandomWeights {
 public:
  void Fill(double deviation, std::vector<uint16_t>* weights) {
    std::vector<uint16_t> table(kQuantiles);
    for (int i = 0; i < kQuantiles; ++i) {
      table[i] = formats::FloatToBfloat16(static_cast<float>(deviation * normals_[i]));
    }
    for (uint16_t& weight : *weights) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      weight = table[state_ >> 48 & (kQuantiles - 1)];
    }
  }

 private:
  static constexpr int kQuantiles = 1 << 12;
  static std::vector<double> Normals() {
    std::mt19937_64 random(9);
    std::normal_distribution<double> normal;
    std::vector<double> values(kQuantiles);
    for (double& value : values) value = normal(random);
    return values;
  }
  const std::vector<double> normals_ = Normals();
  uint64_t state_ = 1;
};

// A checkpoint in bf16, tensor by tensor: the layout of the output with nothing quantised.
void WriteRandomModel(const std::filesystem::path& dir, const ModelConfig& config) {
  const auto plan = PlanOutput(config, int64_t{4} << 30);
  ASSERT_TRUE(plan.ok()) << plan.status();
  wintserve::testing::WriteFile(dir / "config.json", testing::ConfigJson(config).dump());
  if (plan->files.size() > 1) {
    wintserve::testing::WriteFile(dir / "model.safetensors.index.json", plan->IndexJson());
  }
  std::vector<std::ofstream> files;
  for (const PlannedFile& file : plan->files) {
    files.emplace_back(dir / file.name, std::ios::binary);
    files.back() << file.header;
  }
  RandomWeights random;
  for (const PlannedStep& step : plan->steps) {
    for (const PlannedTensor& tensor : step.tensors) {
      std::vector<uint16_t> values(step.k * step.n);
      const bool is_vector = step.k == 1;
      // Activations keep the size that they have; a norm multiplies by about 1.
      const bool is_embedding = step.name.ends_with("embed_tokens");
      random.Fill(is_embedding ? 1 : is_vector ? 0.1 : 1 / std::sqrt(step.k), &values);
      if (is_vector && tensor.type == TensorType::kBF16) {
        for (uint16_t& value : values) {
          value = formats::FloatToBfloat16(1 + formats::Bfloat16ToFloat(value));
        }
      }
      std::ofstream& file = files[tensor.file];
      if (tensor.type == TensorType::kF32) {
        for (const uint16_t value : values) {
          const float weight = formats::Bfloat16ToFloat(value);
          file.write(reinterpret_cast<const char*>(&weight), sizeof(weight));
        }
      } else {
        file.write(reinterpret_cast<const char*>(values.data()), tensor.size_bytes);
      }
    }
  }
  for (std::ofstream& file : files) ASSERT_TRUE(file.flush().good());
}

struct Usage {
  int64_t peak_bytes = 0;  // of memory
  double seconds = 0;
  double core_seconds = 0;
};

// Runs the program.
Usage Quantize(const std::filesystem::path& model, const std::filesystem::path& output,
               int64_t num_threads, const std::vector<std::string>& options = {}) {
  std::vector<std::string> args = {"wintserve quantize",
                                   "--model",
                                   model.string(),
                                   "--output",
                                   output.string(),
                                   "--wint4-layers=0",
                                   fmt::format("--threads={}", num_threads)};
  args.insert(args.end(), options.begin(), options.end());
  std::vector<char*> argv;
  for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  const auto begin = std::chrono::steady_clock::now();
  pid_t child = 0;
  CHECK(::posix_spawn(&child, g_program.c_str(), nullptr, nullptr, argv.data(), environ) == 0);
  int state = 0;
  rusage usage = {};
  CHECK(::wait4(child, &state, 0, &usage) == child);
  EXPECT_TRUE(WIFEXITED(state) && WEXITSTATUS(state) == 0) << state;
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return {
      .peak_bytes = int64_t{usage.ru_maxrss} * 1024,
      .seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(),
      .core_seconds = seconds(usage.ru_utime) + seconds(usage.ru_stime)};
}

// What rounding may have at once, as RoundingQuantizer says, and what the program needs beside.
int64_t MemoryBound(const ModelConfig& config) {
  int64_t largest = 0;
  const auto plan = PlanOutput(config, int64_t{4} << 30);
  for (const PlannedStep& step : plan->steps) largest = std::max(largest, step.k * step.n);
  // Read (one ahead), as float32, made and packed, and mapped pages of the source of two matrices
  // and of what is read before they are let go of.
  const int64_t of_matrix = largest * (2 * 2 + 4 + 1 + 1 + 2 * 2);
  const int64_t between_releases = 256 << 20;
  const int64_t program = 64 << 20;
  return of_matrix + std::min(between_releases, 2 * largest * int64_t{config.num_experts}) +
         program;
}

// Logits of the prompt's last token, by a group of ranks.
std::vector<float> Logits(const std::filesystem::path& dir, int world_size) {
  auto config = LoadModelConfig(dir);
  CHECK(config.ok(), "{}", config.status().ToString());
  auto checkpoint = Checkpoint::Open(dir, *config, KOrderChoice::kMma64);
  CHECK(checkpoint.ok(), "{}", checkpoint.status().ToString());
  kernels::Batch batch;
  const std::vector<int32_t> blocks = {2, 0, 3, 1};
  for (int i = 0; i < kNumTokens; ++i) batch.tokens.push_back(37 * i % config->vocab_size);
  batch.rows.push_back(
      {.position = 0, .length = kNumTokens, .block_table = blocks, .want_logits = true});

  ThreadGroup group(world_size);
  std::vector<float> logits(config->vocab_size);
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < world_size; ++rank) {
    ranks.emplace_back([&, rank] {
      const auto backend = kernels::cpu::CreateCpuBackend({.num_threads = 1});
      const auto source =
          MakeCheckpointSource(*config, **checkpoint, backend.get(), rank, world_size, 1);
      auto model = LoadErnie45(*config, source.get(), backend.get(),
                               world_size == 1 ? nullptr : group.rank(rank),
                               {.max_batch_tokens = kNumTokens, .max_logit_rows = 1});
      CHECK(model.ok(), "{}", model.status().ToString());
      const auto pool = *backend->Allocate(kBlocks * (*model)->kv_block_bytes());
      const auto device_batch = *backend->CreateBatch(
          {.max_tokens = kNumTokens, .max_rows = 1, .max_blocks_per_row = kBlocks, .num_slots = 1});
      backend->SetBatch(batch, device_batch.get());
      const auto result = (*model)->Forward(*device_batch, pool->data());
      CHECK(result.ok(), "{}", result.status().ToString());
      if (rank != 0) return;
      CHECK(backend->CopyToHost(logits.data(), result->row(0), logits.size() * sizeof(float)).ok());
    });
  }
  for (std::thread& rank : ranks) rank.join();
  return logits;
}

double Norm(const std::vector<float>& values) {
  double sum = 0;
  for (const float value : values) sum += double{value} * value;
  return std::sqrt(sum);
}

class QuantizedLayer : public ::testing::TestWithParam<Shape> {};

TEST_P(QuantizedLayer, GivesTheSameLogitsOn1And2And4RanksWithinItsMemory) {
  const Shape& shape = GetParam();
  if (g_calibrate) GTEST_SKIP() << "--calibrate runs the calibrated ones";
  if (shape.is_large != g_large) GTEST_SKIP() << "of the other size; --large runs the large ones";
  const ModelConfig config = ConfigOf(shape);
  const TempDir dir;
  WriteRandomModel(dir.path() / "model", config);
  const int64_t memory = Quantize(dir.path() / "model", dir.path() / "out", 2).peak_bytes;
  const int64_t bound = MemoryBound(config);
  fmt::print("{}: {} experts, {} MiB at most, allowed {} MiB\n", shape.name, config.num_experts,
             memory >> 20, bound >> 20);
  EXPECT_LE(memory, bound);
  std::filesystem::remove_all(dir.path() / "model");

  const std::vector<float> alone = Logits(dir.path() / "out", 1);
  EXPECT_GT(Norm(alone), 0);
  for (const int world_size : {2, 4}) {
    const std::vector<float> split = Logits(dir.path() / "out", world_size);
    std::vector<float> difference(alone.size());
    for (size_t i = 0; i < alone.size(); ++i) difference[i] = split[i] - alone[i];
    // Ranks add up the products of o_proj and down_proj in another order. A sum of K terms is then
    // off by about sqrt(K) roundings of 2^-24; four times that for each of the two, and as much for
    // what the head makes of it.
    const double k = std::max<double>(config.hidden_size, config.num_heads * config.head_dim);
    const double allowed = 3 * 4 * std::sqrt(k) * 0x1p-24;
    const double off = Norm(difference) / Norm(alone);
    fmt::print("{} ranks: logits are off by {:.1e}, allowed {:.1e}\n", world_size, off, allowed);
    EXPECT_LE(off, allowed);
  }
}

INSTANTIATE_TEST_SUITE_P(All, QuantizedLayer,
                         ::testing::Values(Shape{"Small", false, 256, 8, 4, 32, 256, 4, 2, 1},
                                           Shape{"21B", true, 2560, 20, 4, 128, 1536, 64, 6, 2},
                                           Shape{"300B", true, 8192, 64, 8, 128, 3584, 8, 8, 0}),
                         [](const auto& info) { return info.param.name; });

constexpr char kTokenizerDir[] = "tests/data/tiny-bf16";

// The vocabulary is that of the tokenizer; each expert gets as large a share of the tokens as one
// of the published model's 64 experts.
ModelConfig CalibratedConfigOf(const Shape& shape) {
  constexpr int kPublishedExperts = 64;
  ModelConfig config = ConfigOf(shape);
  config.vocab_size = 8192;
  config.max_position_embeddings = 2048;
  if (shape.is_large) {
    config.num_experts_per_token =
        std::max(1, config.num_experts * shape.top_k / kPublishedExperts);
  }
  return config;
}

// Plain text of at least so many tokens, whatever the tokenizer merges.
void WriteText(const std::filesystem::path& path, int64_t num_tokens) {
  constexpr int64_t kLettersPerToken = 8;
  std::mt19937_64 random(5);
  std::string text;
  while (std::ssize(text) < num_tokens * kLettersPerToken) {
    text += random() % 6 == 0 ? ' ' : static_cast<char>('a' + random() % 26);
  }
  wintserve::testing::WriteFile(path, text);
}

// How many tokens the program will take.
int64_t CountTokens(const std::filesystem::path& model, const std::filesystem::path& text,
                    int64_t max_tokens) {
  const auto tokenizer = Tokenizer::Load(model);
  CHECK(tokenizer.ok(), "{}", tokenizer.status().ToString());
  const auto loaded = LoadCalibrationText(text, **tokenizer, {.max_tokens = max_tokens});
  CHECK(loaded.ok(), "{}", loaded.status().ToString());
  return loaded->num_tokens;
}

// What the 300B's layer may take, and of a small one what CalibratedQuantizer and the encoders'
// headers say, with every token in every expert, besides the program and its libraries.
int64_t CalibrationMemoryBound(const Shape& shape, const ModelConfig& config, int64_t num_tokens) {
  if (shape.is_large) return int64_t{16} << 30;
  const int64_t hidden = config.hidden_size;
  const int64_t attended = int64_t{config.num_heads} * config.head_dim;
  const int64_t k = std::max(hidden, attended);
  const int64_t of_tokens =
      num_tokens * (20 * hidden + 8 * attended + 8 * config.moe_intermediate_size);
  const int64_t of_moments = 8 * k * k + 4 * k * hidden + 8 * hidden * hidden;
  const int64_t of_encoder = 24 * k * k;
  const int64_t program = 64 << 20;
  return MemoryBound(config) + of_tokens + of_moments + of_encoder + program;
}

class CalibratedLayer : public ::testing::TestWithParam<Shape> {};

TEST_P(CalibratedLayer, IsMadeWithinItsMemory) {
  const Shape& shape = GetParam();
  if (g_large || shape.is_large != g_calibrate) GTEST_SKIP() << "--calibrate runs the large one";
  const ModelConfig config = CalibratedConfigOf(shape);
  const TempDir dir;
  const std::filesystem::path model = dir.path() / "model";
  const std::filesystem::path text = dir.path() / "text.txt";
  WriteRandomModel(model, config);
  for (const char* name : {"tokenizer.model", "tokenizer_config.json"}) {
    std::filesystem::copy_file(std::filesystem::path(kTokenizerDir) / name, model / name);
  }
  const int64_t num_tokens =
      shape.is_large ? Setting("CALIBRATION_TOKENS", DefaultCalibrationTokens(config)) : 600;
  WriteText(text, num_tokens);
  ASSERT_EQ(CountTokens(model, text, num_tokens), num_tokens);

  const int64_t num_threads =
      shape.is_large ? Setting("THREADS", std::thread::hardware_concurrency()) : 2;
  const int64_t default_sweeps = FeedbackOptions().num_sweeps;
  const int64_t num_sweeps =
      shape.is_large ? Setting("SWEEPS", default_sweeps, /*least=*/0) : default_sweeps;
  const Usage usage =
      Quantize(model, dir.path() / "out", num_threads,
               {"--calibration", text.string(), fmt::format("--calibration-tokens={}", num_tokens),
                fmt::format("--sweeps={}", num_sweeps)});
  const int64_t bound = CalibrationMemoryBound(shape, config, num_tokens);
  fmt::print(
      "{}, {} experts of which a token takes {}, {} tokens, {} sweeps, {} threads: {} MiB at most, "
      "allowed {} MiB; {:.1f} s, {:.0f} s of a core\n",
      shape.name, config.num_experts, config.num_experts_per_token, num_tokens, num_sweeps,
      num_threads, usage.peak_bytes >> 20, bound >> 20, usage.seconds, usage.core_seconds);
  EXPECT_LE(usage.peak_bytes, bound);

  const double norm = Norm(Logits(dir.path() / "out", 1));
  EXPECT_GT(norm, 0);
  EXPECT_TRUE(std::isfinite(norm));
}

INSTANTIATE_TEST_SUITE_P(All, CalibratedLayer,
                         ::testing::Values(Shape{"Small", false, 256, 8, 4, 32, 256, 4, 2, 1},
                                           Shape{"300B", true, 8192, 64, 8, 128, 3584, 8, 8, 0}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve::quantizer

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  if (argc < 2) {
    fmt::print(stderr, "usage: {} PATH_OF_WINTSERVE_QUANTIZE [--large | --calibrate]\n", argv[0]);
    return 1;
  }
  wintserve::quantizer::g_program = argv[1];
  wintserve::quantizer::g_large = argc > 2 && std::string_view(argv[2]) == "--large";
  wintserve::quantizer::g_calibrate = argc > 2 && std::string_view(argv[2]) == "--calibrate";
  return RUN_ALL_TESTS();
}
