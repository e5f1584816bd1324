#include "tools/quantizer/output/convert.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "engine_worker/weights/layout.h"
#include "engine_worker/weights/matrix_loader.h"
#include "engine_worker/weights/tensor_set.h"
#include "tools/quantizer/output/matrix_bytes.h"
#include "tools/quantizer/output/scheme.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kCommitInterval{60};

absl::Status WithName(const PlannedStep& step, const absl::Status& status) {
  if (status.ok()) return status;
  return {status.code(), fmt::format("{}: {}", step.name, std::string(status.message()))};
}

std::string LayerName(int layer, int num_layers) {
  if (layer < 0) return "embedding";
  return layer == num_layers ? "head" : fmt::format("layer {}", layer);
}

class Converter {
 public:
  explicit Converter(const Conversion& conversion)
      : c_(conversion), steps_(conversion.plan->steps) {}

  absl::StatusOr<Totals> Run() {
    RETURN_IF_ERROR(WriteSmallFiles());
    num_done_ = c_.output->num_steps_before();
    totals_ = Totals::FromJson(c_.output->notes_before());
    RETURN_IF_ERROR(ReplayDone());
    if (const absl::Status status = MakeRest(); !status.ok()) {
      // What is made need not be made again; the first error is the one to tell.
      (void)Commit();
      return status;
    }
    RETURN_IF_ERROR(c_.output->Finish());
    return totals_;
  }

 private:
  auto Sink() {
    return [this](const PlannedTensor& tensor, std::span<const uint8_t> bytes) {
      return c_.output->WriteTensor(tensor, bytes);
    };
  }

  absl::Status WriteSmallFiles() {
    RETURN_IF_ERROR(c_.output->WriteText("config.json",
                                         QuantizedConfigJson(c_.source->config_json, *c_.target)));
    for (const auto& path : c_.source->companions) RETURN_IF_ERROR(c_.output->CopyFile(path));
    return absl::OkStatus();
  }

  // The files have their size and their headers from the start, so they are read like any others.
  absl::Status ReplayDone() {
    if (num_done_ == 0) return absl::OkStatus();
    ASSIGN_OR_RETURN(const TensorSet set, TensorSet::Open(c_.output->partial()));
    const Layout layout = CanonicalLayout(*c_.target);
    for (int64_t i = 0; i < num_done_; ++i) {
      RETURN_IF_ERROR(CheckStop());
      SetNote(fmt::format("taking up {}", LayerName(steps_[i].layer, c_.target->num_layers)));
      RETURN_IF_ERROR(c_.output->CheckStep(i, steps_[i]));
      const auto* ref = std::get_if<MatrixRef>(&steps_[i].ref);
      if (ref == nullptr) continue;
      ASSIGN_OR_RETURN(
          HostMatrix done,
          LoadMatrixSlice(set, DescribeMatrix(layout, *c_.target, *ref), /*rank=*/0,
                          /*world_size=*/1, c_.k_order, ref->role == MatrixRole::kRouter));
      RETURN_IF_ERROR(WithName(steps_[i], c_.quantizer->Replay(*ref, std::move(done))));
    }
    return absl::OkStatus();
  }

  absl::Status MakeRest() {
    const int64_t num_steps = static_cast<int64_t>(steps_.size());
    while (num_done_ < num_steps) {
      RETURN_IF_ERROR(CheckStop());
      const PlannedStep& step = steps_[num_done_];
      BeginLayer(step.layer);
      const bool is_matrix = std::holds_alternative<MatrixRef>(step.ref);
      RETURN_IF_ERROR(is_matrix ? MakeMatrix(step) : MakeVector(step));
      c_.output->EndStep();
      ++num_done_;
      if (c_.progress != nullptr && is_matrix) c_.progress->Add(1);
      const bool ends_layer = num_done_ == num_steps || steps_[num_done_].layer != step.layer;
      if (ends_layer) EndLayer(step.layer);
      if (ends_layer || Clock::now() - last_commit_ > kCommitInterval) RETURN_IF_ERROR(Commit());
    }
    return absl::OkStatus();
  }

  absl::Status MakeMatrix(const PlannedStep& step) {
    const MatrixRef& ref = std::get<MatrixRef>(step.ref);
    absl::StatusOr<HostMatrix> matrix = c_.quantizer->Next(ref, step.format);
    RETURN_IF_ERROR(WithName(step, matrix.status()));
    WeightError error;
    const HostMatrix* source = c_.quantizer->source();
    if (source != nullptr) error = MeasureWeightError(*source, *matrix, *c_.pool);
    RETURN_IF_ERROR(EmitMatrix(step, *matrix, Sink()));
    totals_.Add(step, error);
    of_layer_.Add(step, error);
    return absl::OkStatus();
  }

  absl::Status MakeVector(const PlannedStep& step) {
    const VectorRef& ref = std::get<VectorRef>(step.ref);
    std::vector<float> values;
    if (ref.role == VectorRole::kFinalNorm) {
      ASSIGN_OR_RETURN(values, c_.quantizer->FinalNorm());
    }
    if (values.empty()) {
      ASSIGN_OR_RETURN(values, c_.source->checkpoint->LoadVector(ref.role, ref.layer));
    }
    RETURN_IF_ERROR(EmitVector(step, values, Sink()));
    return absl::OkStatus();
  }

  absl::Status Commit() {
    last_commit_ = Clock::now();
    return c_.output->Commit(totals_.ToJson());
  }

  absl::Status CheckStop() const {
    if (c_.stop == nullptr || !c_.stop->load()) return absl::OkStatus();
    return absl::CancelledError(
        fmt::format("stopped; the same command goes on with {}", c_.output->partial().string()));
  }

  void SetNote(std::string note) {
    if (c_.progress != nullptr) c_.progress->SetNote(std::move(note));
  }

  void BeginLayer(int layer) {
    if (layer == layer_) return;
    layer_ = layer;
    layer_begin_ = Clock::now();
    of_layer_ = {};
    SetNote(LayerName(layer, c_.target->num_layers));
  }

  // "layer 3: 131 matrices in 12.3 s; relative error: wint2 experts 0.3201, wint8 attention 0.0081"
  void EndLayer(int layer) {
    const int64_t num_matrices = of_layer_.Sum().num_matrices;
    if (c_.progress == nullptr || num_matrices == 0) return;
    const double seconds = std::chrono::duration<double>(Clock::now() - layer_begin_).count();
    std::string errors;
    for (const auto& [name, kind] : of_layer_.kinds) {
      if (kind.error.norm == 0) continue;
      errors += fmt::format("{} {} {:.4f}", errors.empty() ? "; relative error:" : ",", name,
                            std::sqrt(kind.error.nmse()));
    }
    c_.progress->Print(fmt::format("{}: {} {} in {:.1f} s{}",
                                   LayerName(layer, c_.target->num_layers), num_matrices,
                                   num_matrices == 1 ? "matrix" : "matrices", seconds, errors));
  }

  const Conversion& c_;
  const std::vector<PlannedStep>& steps_;
  int64_t num_done_ = 0;
  Totals totals_;
  Totals of_layer_;
  int layer_ = -2;
  Clock::time_point layer_begin_;
  Clock::time_point last_commit_ = Clock::now();
};

}  // namespace

absl::StatusOr<Totals> Convert(const Conversion& conversion) { return Converter(conversion).Run(); }

}  // namespace wintserve::quantizer
