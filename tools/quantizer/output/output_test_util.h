// Small checkpoints with their config.json, and a whole conversion in one call.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/read_file.h"
#include "common/status_macros.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "tools/quantizer/output/convert.h"
#include "tools/quantizer/output/rounding_quantizer.h"
#include "tools/quantizer/output/scheme.h"

namespace wintserve::quantizer::testing {

using wintserve::testing::TempDir;
using wintserve::testing::TestLayout;
using wintserve::testing::TestTensors;

// As of a source: config.json says the type of its tensors.
inline nlohmann::json ConfigJson(const ModelConfig& config) {
  nlohmann::json json = nlohmann::json::parse(wintserve::testing::ConfigJson(config));
  json["torch_dtype"] = "bfloat16";
  return json;
}

inline void WriteModel(const std::filesystem::path& dir, const ModelConfig& config,
                       const TestTensors& tensors) {
  wintserve::testing::WriteFile(dir / "config.json", ConfigJson(config).dump());
  wintserve::testing::WriteFile(dir / "model.safetensors",
                                wintserve::testing::SafetensorsBytes(tensors));
}

// What a conversion is made of but for the directories.
struct Job {
  SchemeOptions scheme = {};
  formats::KOrder k_order = formats::KOrder::kMma64;
  int64_t max_file_bytes = 1 << 18;
  int num_threads = 2;
  RunIdentity identity = {{"--scheme", "test"}};
  bool overwrite_partial = false;
  const std::atomic<bool>* stop = nullptr;
  Progress* progress = nullptr;
  // Puts another quantiser in front of the one that rounds.
  std::function<std::unique_ptr<MatrixQuantizer>(MatrixQuantizer*)> wrap = {};
};

inline absl::StatusOr<Totals> RunJob(const std::filesystem::path& model,
                                     const std::filesystem::path& output, const Job& job) {
  ASSIGN_OR_RETURN(const Source source, OpenSource(model));
  ASSIGN_OR_RETURN(const ModelConfig target, QuantizedConfig(source.config, job.scheme));
  ASSIGN_OR_RETURN(const OutputPlan plan, PlanOutput(target, job.max_file_bytes));
  kernels::cpu::ThreadPool pool(job.num_threads);
  RoundingQuantizer rounding(source.config, *source.checkpoint,
                             Wint2Options{.k_order = job.k_order}, &pool);
  std::unique_ptr<MatrixQuantizer> wrapped;
  if (job.wrap) wrapped = job.wrap(&rounding);
  ASSIGN_OR_RETURN(OutputDir dir,
                   OutputDir::Open(output, plan, job.identity, job.overwrite_partial));
  return Convert({.source = &source,
                  .target = &target,
                  .plan = &plan,
                  .k_order = job.k_order,
                  .quantizer = wrapped == nullptr ? &rounding : wrapped.get(),
                  .pool = &pool,
                  .output = &dir,
                  .progress = job.progress,
                  .stop = job.stop});
}

// Counts steps in numbers of the caller's, and does something before one of them.
class Watched final : public MatrixQuantizer {
 public:
  Watched(MatrixQuantizer* inner, int* num_made, int* num_replayed, int at,
          std::function<void()> before)
      : inner_(inner),
        num_made_(num_made),
        num_replayed_(num_replayed),
        at_(at),
        before_(std::move(before)) {}

  absl::StatusOr<formats::HostMatrix> Next(const MatrixRef& ref, StoredFormat format) override {
    if (*num_made_ + *num_replayed_ == at_) before_();
    ++*num_made_;
    return inner_->Next(ref, format);
  }
  absl::Status Replay(const MatrixRef& ref, formats::HostMatrix done) override {
    ++*num_replayed_;
    return inner_->Replay(ref, std::move(done));
  }
  const formats::HostMatrix* source() const override { return inner_->source(); }

 private:
  MatrixQuantizer* const inner_;
  int* const num_made_;
  int* const num_replayed_;
  const int at_;
  const std::function<void()> before_;
};

// A small model, and runs that make its output, watched step by step.
class ConversionTest : public ::testing::Test {
 protected:
  // output: relative to dir_.
  explicit ConversionTest(const std::filesystem::path& output = "out") : output_(output) {
    const ModelConfig config = wintserve::testing::SmallConfig();
    WriteModel(Model(), config,
               wintserve::testing::MakeTensors(config, TestLayout::kHuggingFace, 3));
    num_matrices_ = static_cast<int>(AllMatrices(config).size());
  }

  std::filesystem::path Model() const { return dir_.path() / "model"; }
  std::filesystem::path Output() const { return dir_.path() / output_; }
  std::filesystem::path Partial() const { return OutputDir::PartialPath(Output()); }

  // The run, with its steps counted and `before` done before matrix `at`.
  absl::StatusOr<Totals> Run(
      Job job = {}, int at = -1, std::function<void()> before = [] {}) {
    num_made_ = num_replayed_ = 0;
    job.wrap = [&](MatrixQuantizer* inner) -> std::unique_ptr<MatrixQuantizer> {
      return std::make_unique<Watched>(inner, &num_made_, &num_replayed_, at, before);
    };
    return RunJob(Model(), Output(), job);
  }

  const TempDir dir_;
  const std::filesystem::path output_;
  int num_matrices_ = 0;
  int num_made_ = 0;
  int num_replayed_ = 0;
};

// Name -> bytes of every file.
inline std::map<std::string, std::string> FilesOf(const std::filesystem::path& dir) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    auto text = ReadFile(entry.path());
    CHECK(text.ok(), "{}", text.status().ToString());
    files[entry.path().filename().string()] = *std::move(text);
  }
  return files;
}

}  // namespace wintserve::quantizer::testing
