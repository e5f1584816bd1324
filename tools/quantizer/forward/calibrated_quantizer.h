// Quantises with calibration: every matrix is made for the inputs that it will get.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/checkpoint.h"
#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"
#include "tools/quantizer/calibrate/moments.h"
#include "tools/quantizer/forward/matrix_encoder.h"
#include "tools/quantizer/forward/row_buffer.h"
#include "tools/quantizer/forward/sequence_batches.h"
#include "tools/quantizer/forward/token_states.h"
#include "tools/quantizer/matrix_quantizer.h"

namespace wintserve::quantizer {

struct CalibrationOptions {
  bool solve_final_norm = true;  // CalibratedQuantizer::FinalNorm
  // An expert with fewer than `poor_rows` rows for each of its inputs counts `prior_rows` average
  // rows of its layer for each besides: for gate-up those of all tokens, for down what the expert
  // itself makes of a sample of all tokens.
  double poor_rows = 4;
  double prior_rows = 0.25;
};

// After each layer: how far the residual of the quantised model is from that of the unquantised
// one, sum of (x_q - x_f)^2 / sum of x_f^2.
struct LayerDrift {
  int layer = 0;
  double relative_error = 0;    // both sums over all calibration tokens
  double mean_token_error = 0;  // the mean of each token's, which the weights of rows make small
};

// Two models see the calibration tokens, the unquantised one and the one quantised so far. A matrix
// is made when the activations of both have come to it, and then they pass it, each with its own.
//
// An expert's rows are the tokens that the quantised model routes to it; each counts with the
// square of its routing weight g, as the error of the layer's output is the sum over experts of g
// times that of the expert. Next to them go the inputs that the unquantised model has for the same
// tokens, be they routed to the expert there or not.
//
// Besides, the row of a token t counts in every sum of a matrix by what its module leaves:
//   v_t / mean over all tokens of v,  v_t = 1 / (mean over k of r_f[t, k]^2 + epsilon)
// (row_weights.h: the next norm divides by that, and the tokens that attention rests on, whose
// residual is the largest, would rule otherwise). epsilon is that of the norms, r_f the residual of
// the unquantised model:
//   qkv, output                 after attention
//   gate-up, down of any MLP    after the whole MLP, all experts and the shared ones
//   router                      before the MLP: the unquantised model passes its experts once the
//                               quantised one has routed, so that one pass serves both routings
// For that the unquantised model goes ahead: before qkv through attention, before gate-up through a
// dense MLP, after the router through all experts. It costs one more product with the output matrix
// and the dense down matrix of the source, and one more pass of it through the shared experts.
//
// What repairs the residual (Moments::cross_output) is, for the matrices of attention and of a
// dense MLP, the difference of the residuals r_f - r_q that they add to. The experts of a layer are
// made one after another, so each also makes up for what routing and the experts before it have
// changed:
//   d = (r_f + sum over experts, as the unquantised model routes, of g_f e(x_f)
//        - r_q - sum over experts done, as the quantised model routes, of g_q e_q(x_q)
//        - sum over experts to come, as the quantised model routes, of g_q e(x_f)) / g_q
// with e the unquantised expert and e_q what became of it.
//
// Memory, besides one matrix at a time as read, as made and as packed for both models (and one of
// the source that comes after it, read and packed), T tokens, H hidden size, A = heads * head_dim,
// M width of an MLP, R rows of an expert:
//   8 T H            residuals of both
//   12 T             weights of rows, and what they come from
//   8 T A            from qkv to output, attention of both
//   12 T H           in MoE layers, the sums of the experts of both, and what is to be made up for
//   8 R M            what both models feed to the down matrix (R = T for dense and shared MLPs; of
//                    a dense MLP half of it from gate-up on)
//   8 k^2            hessian and cross of the matrix (4 k n more with cross_output), and whatever
//                    the encoder needs
//   8 H^2            in MoE layers, the same over all tokens, for the router and poor experts
// For T = 16,384 tokens, H = A = 8192, M = 3584 and 64 experts of which a token takes 8: 1 + 1.5
// GiB of residuals and sums, 0.06 GiB (R = T / 8) to 0.5 GiB of an expert's activations, 1 GiB of
// moments, 1 GiB of gate-up matrices as bf16, float32 and packed, and the encoder's 1.5 GiB.
//
// Log: after each layer its LayerDrift and how long it took.
// Threading: one thread; work is spread over the pool's threads and as many of a CPU backend's own.
class CalibratedQuantizer final : public MatrixQuantizer {
 public:
  // config: of the source checkpoint. Checkpoint and pool outlive it.
  // INVALID_ARGUMENT: no tokens, a token outside the model's vocabulary, sequences longer than
  // max_position_embeddings, shapes that the CPU backend does not have.
  static absl::StatusOr<std::unique_ptr<CalibratedQuantizer>> Create(
      const ModelConfig& config, const Checkpoint& checkpoint, std::vector<TokenSequence> sequences,
      std::unique_ptr<MatrixEncoder> encoder, const CalibrationOptions& options,
      kernels::cpu::ThreadPool* pool);

  absl::StatusOr<formats::HostMatrix> Next(const MatrixRef& ref, StoredFormat format) override;
  absl::Status Replay(const MatrixRef& ref, formats::HostMatrix done) override;
  // The gain of the final norm [hidden_size] that brings what the head gets nearest to what it gets
  // in the unquantised model: for each column i the least sum over tokens of
  //   (gain_i r_q,i / rms(r_q) - n_i r_f,i / rms(r_f))^2
  // with n the checkpoint's gain. Nothing where the models do not differ, or if it is switched off.
  // REQUIRES: every layer is done.
  absl::StatusOr<std::vector<float>> FinalNorm() const override;
  // Null for a matrix that is stored unquantised.
  const formats::HostMatrix* source() const override { return source_.k == 0 ? nullptr : &source_; }

  const TokenStates& unquantized() const { return *states_[kUnquantized]; }
  const TokenStates& quantized() const { return *states_[kQuantized]; }
  // Of the layers that are done.
  const std::vector<LayerDrift>& drift() const { return drift_; }

 private:
  enum Which { kUnquantized, kQuantized };
  static constexpr Which kBoth[] = {kUnquantized, kQuantized};

  // One MLP between its gate-up and its down matrix.
  struct MlpStep {
    TokenRows rows;            // that the quantised model sends through it
    RowBuffer activations[2];  // [rows, width] in each model
  };

  // A matrix in the form of the backend for each model; both the same where it is unchanged.
  struct Packed {
    std::unique_ptr<kernels::WeightMatrix> matrices[2];
    const kernels::WeightMatrix& of(int which) const {
      return matrices[which] != nullptr ? *matrices[which] : *matrices[kUnquantized];
    }
  };

  // The inputs of one matrix: rows `first` … of one model, valid until the next call.
  using InputRows =
      absl::FunctionRef<kernels::ConstRows(Which which, int64_t first, int64_t count)>;

  CalibratedQuantizer(const ModelConfig& config, const Checkpoint& checkpoint,
                      std::vector<TokenSequence> sequences, std::unique_ptr<MatrixEncoder> encoder,
                      const CalibrationOptions& options, kernels::cpu::ThreadPool* pool);
  absl::Status Init();

  absl::Status Begin(const MatrixRef& ref);
  // A matrix of the checkpoint, packed.
  absl::StatusOr<std::unique_ptr<kernels::WeightMatrix>> LoadSource(const MatrixRef& ref) const;
  // The unquantised model goes ahead to what its module leaves, for row_weights_.
  absl::Status ForeseeAttention(int layer);
  absl::Status ForeseeDenseMlp(const MatrixRef& ref);
  // row_weights_ of the unquantised model's residual + inputs [tokens, k] * matrix.
  absl::Status WeighRows(kernels::ConstRows inputs, const kernels::WeightMatrix& matrix);
  absl::StatusOr<formats::HostMatrix> Make(const MatrixRef& ref, StoredFormat format);
  absl::StatusOr<Moments> MomentsOf(const MatrixRef& ref, const MomentNeeds& needs);
  absl::StatusOr<Moments> ExpertMoments(const MatrixRef& ref, const MomentNeeds& needs);
  // Of gate-up, router and qkv, which take the normalised residual of `rows`.
  absl::StatusOr<Moments> NormedMoments(const TokenRows& rows, const MomentNeeds& needs);
  absl::StatusOr<Moments> DownMoments(const MlpStep& step, const MomentNeeds& needs);
  // What an average row of the layer weighs for a poor expert: all_tokens_, or of_sample, which it
  // sets.
  absl::StatusOr<const Moments*> PriorMoments(const MatrixRef& ref, const MomentNeeds& needs,
                                              Moments* of_sample);
  absl::StatusOr<const Moments*> AllTokensMoments(const MomentNeeds& needs);
  int64_t GatherRows(int64_t k, int64_t num_rows) const;
  absl::StatusOr<Moments> Gather(const TokenRows& rows, int64_t k, const MomentNeeds& needs,
                                 InputRows inputs);
  // d of cross_output for `count` of `rows` from `first` on.
  void FillRepairs(const TokenRows& rows, int64_t first, int64_t count, kernels::Rows out) const;

  absl::Status Advance(const MatrixRef& ref, const formats::HostMatrix& made);
  absl::StatusOr<Packed> Pack(const MatrixRef& ref, const formats::HostMatrix& made);
  // Once both models have routed.
  absl::Status BeginExperts(int layer);
  absl::Status ForeseeExpert(int layer, int expert);
  absl::Status StartMlp(const MatrixRef& ref, Packed gate_up);
  absl::Status FinishMlp(const MatrixRef& ref, const Packed& down);
  absl::Status FinishLayer(int layer);

  const ModelConfig config_;
  const Checkpoint& checkpoint_;
  const SequenceBatches batches_;
  const std::unique_ptr<MatrixEncoder> encoder_;
  const CalibrationOptions options_;
  kernels::cpu::ThreadPool* const pool_;
  const std::unique_ptr<kernels::Backend> backend_;
  const std::vector<MatrixRef> refs_;
  std::unique_ptr<TokenStates> states_[2];

  size_t num_done_ = 0;
  bool has_made_ = false;       // a matrix with Next()
  bool models_differ_ = false;  // in a matrix that was passed
  formats::HostMatrix source_;
  std::vector<float> gain_;              // of the norm before the next matrix
  std::vector<float> router_bias_;       // empty: none
  std::unique_ptr<Moments> all_tokens_;  // of this layer's MLP inputs
  std::vector<float> row_weights_;       // [tokens], of the module whose matrices are being made
  // In a MoE layer, by token: how far its output will be from that of the unquantised model if the
  // experts that are still to come give for each of their tokens what they give there.
  RowBuffer shortfall_;
  Packed gate_up_;  // of the MLP whose down matrix is next
  MlpStep mlp_;
  std::vector<LayerDrift> drift_;
  std::chrono::steady_clock::time_point layer_began_;
  std::chrono::steady_clock::time_point experts_began_;
};

}  // namespace wintserve::quantizer
