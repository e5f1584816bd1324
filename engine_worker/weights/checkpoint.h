// A checkpoint directory, opened and verified as a whole; hands out one rank's slice of one tensor
// at a time in canonical form.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/k_order.h"
#include "kernels/formats/matrix.h"

namespace wintserve {

enum class MatrixRole {
  kEmbedding,  // [vocab, hidden]: k = vocab rows, n = hidden; replicated on every rank
  kHead,       // k = hidden, n = vocab / world_size; the embedding transposed when tied
  kQkv,        // k = hidden, n = (heads + 2 * kv_heads) * head_dim of the rank: q, then k, then v
  kOutput,     // k = heads * head_dim of the rank, n = hidden
  kGateUp,     // k = hidden, n = 2 * width of the rank: gate, then up
  kDown,       // k = width of the rank, n = hidden
  kRouter,     // k = hidden, n = experts, kFloat32; replicated
};

inline constexpr int kDenseMlp = -1;       // MatrixRef::expert of a dense layer's MLP
inline constexpr int kSharedExperts = -2;  // … of the shared experts of a MoE layer

struct MatrixRef {
  MatrixRole role;
  int layer = 0;
  int expert = kDenseMlp;  // kGateUp and kDown only
};

// Every matrix of a model, layer by layer in the order of its operators: the embedding first, the
// head, tied or not, last.
std::vector<MatrixRef> AllMatrices(const ModelConfig& config);

enum class VectorRole { kInputNorm, kPostAttentionNorm, kFinalNorm, kRouterBias };

enum class KOrderChoice { kAuto, kMma64, kNatural };

struct MatrixBytes {
  int64_t on_disk = 0;
  int64_t on_host = 0;  // as a HostMatrix
};

// Threading: thread-safe after Open. The files stay mapped for the object's life.
class Checkpoint {
 public:
  // Finds the files, maps them and checks every tensor: none missing, unknown, misshapen, of a
  // wrong type or beyond its file's end. One error names file, tensor, found and expected
  // (checkpoint_files.h has all of them).
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::filesystem::path& dir,
                                                          const ModelConfig& config,
                                                          KOrderChoice k_order);
  virtual ~Checkpoint() = default;

  // Unquantised weights come as kBfloat16 if stored so, else as kFloat32.
  // INVALID_ARGUMENT: the model does not split over world_size, or is split for another already.
  // DATA_LOSS: a scale that is not finite.
  // REQUIRES: `ref` names a matrix of the model; 0 <= rank < world_size.
  virtual absl::StatusOr<formats::HostMatrix> LoadMatrix(const MatrixRef& ref, int rank,
                                                         int world_size) const = 0;
  // Of what LoadMatrix reads and gives: on disk about, on the host exactly. REQUIRES: as
  // LoadMatrix, and the model splits over world_size.
  virtual MatrixBytes BytesOf(const MatrixRef& ref, int rank, int world_size) const = 0;
  // Float32, replicated on every rank. `layer` is ignored for kFinalNorm.
  virtual absl::StatusOr<std::vector<float>> LoadVector(VectorRole role, int layer) const = 0;

  virtual bool head_is_tied() const = 0;
  virtual bool has_router_bias() const = 0;
  virtual formats::KOrder k_order() const = 0;  // what kAuto decided
  // Why; nothing where the choice was forced or there is no WINT2.
  virtual KOrderEvidence k_order_evidence() const { return {}; }
  // XXH3-64 over every file's header, size and samples of its data: tells checkpoints apart (two
  // trainings of one model included), does not verify the bytes.
  virtual uint64_t digest() const = 0;
  virtual int64_t total_bytes() const = 0;
};

}  // namespace wintserve
