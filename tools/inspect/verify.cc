#include "tools/inspect/verify.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include "common/mutex.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/matrix_loader.h"

namespace wintserve::inspect {
namespace {

constexpr double kLargestNumber = 65536;
constexpr int32_t kLargestCode = 32767;
// A file that was made in full length and not written in full has such pages.
constexpr int64_t kPageBytes = 4096;

// Tensors that are checked together.
struct Item {
  const TensorSet* set = nullptr;
  std::string name;                         // of the matrix, or of a single tensor
  std::optional<StoredMatrix> matrix = {};  // of a quantised one
  bool may_be_zero = true;
  const TensorSet* same_in = nullptr;  // where a tensor of the name holds the same bytes
  std::vector<std::string> tensors = {};
  int64_t num_bytes = 0;
};

std::string Place(const std::vector<int64_t>& shape, int64_t index) {
  std::vector<int64_t> place(shape.size());
  for (size_t i = shape.size(); i-- > 0;) {
    place[i] = index % shape[i];
    index /= shape[i];
  }
  return fmt::format("[{}]", fmt::join(place, ", "));
}

bool IsFloat(TensorType type) {
  const std::vector<TensorType> types = FloatTensorTypes();
  return std::find(types.begin(), types.end(), type) != types.end();
}

class ItemCheck {
 public:
  // on_bytes: called with what is done of a large tensor, piece by piece, and of the rest at the
  // end.
  ItemCheck(const Item& item, const std::function<void(int64_t)>& on_bytes)
      : item_(item), on_bytes_(on_bytes) {}

  std::vector<std::string> Run() {
    if (item_.matrix) {
      CheckQuantized(*item_.matrix);
    } else {
      CheckNumbers(item_.name, item_.may_be_zero);
    }
    if (item_.same_in != nullptr) CheckSame();
    on_bytes_(item_.num_bytes - bytes_told_);
    return std::move(problems_);
  }

 private:
  template <typename... Args>
  void Add(const std::string& tensor, fmt::format_string<Args...> format, Args&&... args) {
    problems_.push_back(fmt::format("{}: tensor {}: {}",
                                    item_.set->Find(tensor)->file->path().string(), tensor,
                                    fmt::format(format, std::forward<Args>(args)...)));
  }
  const TensorView& View(const std::string& tensor) const { return *item_.set->Find(tensor)->view; }

  void CheckNumbers(const std::string& tensor, bool may_be_zero) {
    const TensorView& view = View(tensor);
    if (!IsFloat(view.type)) return;
    // Piece by piece: an embedding in float32 would take gigabytes.
    constexpr int64_t kPiece = 1 << 16;
    const int64_t element = TensorTypeBytes(view.type);
    const auto count = static_cast<int64_t>(view.data.size()) / element;
    int64_t num_bad = 0, first_bad = 0;
    float bad = 0;
    bool is_zero = count > 0;
    for (int64_t begin = 0; begin < count; begin += kPiece) {
      const int64_t size = std::min(kPiece, count - begin);
      const std::vector<float> piece =
          ReadFloats({view.type, {size}, view.data.subspan(begin * element, size * element)});
      on_bytes_(size * element);
      bytes_told_ += size * element;
      for (int64_t i = 0; i < size; ++i) {
        is_zero &= piece[i] == 0;
        if (std::fabs(piece[i]) <= kLargestNumber) continue;
        if (num_bad++ == 0) {
          first_bad = begin + i;
          bad = piece[i];
        }
      }
    }
    if (num_bad > 0) {
      Add(tensor, "found {} of {} numbers that are not finite or beyond {}, the first {} at {}",
          num_bad, count, kLargestNumber, bad, Place(view.shape, first_bad));
    } else if (is_zero && !may_be_zero) {
      Add(tensor, "found nothing but zeros (is the file incomplete?)");
    }
  }

  void CheckQuantized(const StoredMatrix& stored) {
    const auto name = [&](const char* suffix) { return stored.name + "." + suffix; };
    if (stored.format == StoredFormat::kWint2) {
      CheckNumbers(name("super_scales"), /*may_be_zero=*/false);
      CheckLocalScales(name("weight_scale"));
      const size_t num_problems = problems_.size();
      for (const char* suffix : {"code_scale", "code_zp"}) {
        CheckNumbers(name(suffix), /*may_be_zero=*/true);
      }
      if (problems_.size() > num_problems) return;  // what they make of the codes follows from it
      CheckCodes(stored, name("quant_weight"), name("code_scale"), name("code_zp"));
    } else {
      CheckNumbers(name("weight_scale"), /*may_be_zero=*/false);
      CheckPages(name("quant_weight"), stored.format == StoredFormat::kWint8 ? -128 : -8);
    }
  }

  void CheckLocalScales(const std::string& tensor) {
    const std::span<const uint8_t> data = View(tensor).data;
    if (std::all_of(data.begin(), data.end(), [](uint8_t byte) { return byte == 0; })) {
      Add(tensor, "found nothing but zeros: every weight decodes to 0 (is the file incomplete?)");
    }
  }

  void CheckCodes(const StoredMatrix& stored, const std::string& codes_name,
                  const std::string& scale_name, const std::string& zp_name) {
    const auto column_floats = [&](const std::string& name) { return ReadFloats(View(name)); };
    const std::vector<float> scale = column_floats(scale_name), zp = column_floats(zp_name);
    const std::span<const uint8_t> codes = View(codes_name).data;
    std::vector<uint8_t> least(stored.n, 255), largest(stored.n, 0);
    for (int64_t row = 0; row < stored.k / 4; ++row) {
      const uint8_t* bytes = codes.data() + row * stored.n;
      for (int64_t column = 0; column < stored.n; ++column) {
        least[column] = std::min(least[column], bytes[column]);
        largest[column] = std::max(largest[column], bytes[column]);
      }
    }
    int64_t num_bad = 0;
    std::string first;
    for (int64_t column = 0; column < stored.n; ++column) {
      // Codes grow or fall with the byte, so the ends tell of all.
      const auto code = [&](uint8_t byte) {
        // formats::Wint2Code, before it becomes an integer that it may not fit.
        return std::floor(std::fma(static_cast<float>(byte), scale[column], zp[column] + 0.5f));
      };
      const float low = std::min(code(least[column]), code(largest[column]));
      const float high = std::max(code(least[column]), code(largest[column]));
      if (low >= 0 && high <= kLargestCode) continue;
      if (num_bad++ == 0) {
        first =
            fmt::format("column {} (code_scale {}, code_zp {}), whose codes are {:.0f} to {:.0f}",
                        column, scale[column], zp[column], low, high);
      }
    }
    if (num_bad == 0) return;
    Add(scale_name, "found {} of {} columns with codes outside 0 to {}, the first {}", num_bad,
        stored.n, kLargestCode, first);
  }

  void CheckPages(const std::string& tensor, int code) {
    const std::span<const uint8_t> data = View(tensor).data;
    int64_t run = 0;
    for (size_t i = 0; i < data.size(); ++i) {
      run = data[i] == 0 ? run + 1 : 0;
      if (run < kPageBytes) continue;
      return Add(
          tensor,
          "found {} zero bytes in a row from byte {} on: code {}, which no encoder writes (is "
          "the file incomplete?)",
          kPageBytes, static_cast<int64_t>(i) + 1 - kPageBytes, code);
    }
  }

  void CheckSame() {
    const TensorSet::Entry* other = item_.same_in->Find(item_.name);
    const TensorView& view = View(item_.name);
    if (other != nullptr && other->view->type != view.type) {
      Add(item_.name, "found {}, expected {} as in {}", TensorTypeName(view.type),
          TensorTypeName(other->view->type), item_.same_in->dir().string());
    } else if (other == nullptr || other->view->data.size() != view.data.size() ||
               std::memcmp(other->view->data.data(), view.data.data(), view.data.size()) != 0) {
      Add(item_.name, "found other numbers than in {}, expected the same on every rank",
          item_.same_in->dir().string());
    }
  }

  const Item& item_;
  const std::function<void(int64_t)>& on_bytes_;
  int64_t bytes_told_ = 0;
  std::vector<std::string> problems_;
};

// The tensors of one set in groups.
class ItemList {
 public:
  ItemList(const CheckpointFiles& files, const TensorSet& set)
      : files_(files), set_(set), first_(&set == &files.sets.front() ? nullptr : &files.sets[0]) {}

  std::vector<Item> Make() {
    const ModelConfig& config = files_.stored_config;
    for (const MatrixRef& ref : AllMatrices(config)) {
      if (ref.role == MatrixRole::kHead && files_.layout.head_is_tied) continue;
      for (const MatrixPart& part : DescribeMatrix(files_.layout, config, ref).parts) {
        AddMatrix(part.stored, ref.role == MatrixRole::kRouter);
      }
    }
    for (int layer = 0; layer < config.num_layers; ++layer) {
      AddVector(VectorRole::kInputNorm, layer);
      AddVector(VectorRole::kPostAttentionNorm, layer);
      AddVector(VectorRole::kRouterBias, layer);
    }
    AddVector(VectorRole::kFinalNorm, 0);
    for (const auto& [name, entry] : set_.tensors()) {
      if (!taken_.contains(name)) Add({&set_, name}, {name});
    }
    return std::move(items_);
  }

 private:
  void AddMatrix(const StoredMatrix& stored, bool is_replicated) {
    std::vector<std::string> names;
    for (const ExpectedTensor& expected : ExpectedTensors(stored)) {
      if (taken_.contains(expected.name) || !IsAsExpected(expected)) return;
      names.push_back(expected.name);
    }
    if (stored.format != StoredFormat::kPlain) {
      return Add({&set_, stored.name, stored}, std::move(names));
    }
    Item item = {&set_, names.front(), std::nullopt, /*may_be_zero=*/false};
    if (is_replicated) item.same_in = first_;
    Add(std::move(item), std::move(names));
  }

  void AddVector(VectorRole role, int layer) {
    const std::string name = VectorTensorName(files_.layout, role, layer);
    if (set_.Find(name) == nullptr) return;
    Add({&set_, name, std::nullopt, role == VectorRole::kRouterBias, first_}, {name});
  }

  bool IsAsExpected(const ExpectedTensor& expected) const {
    const TensorSet::Entry* entry = set_.Find(expected.name);
    const auto contains = [](const auto& allowed, const auto& value) {
      return std::find(allowed.begin(), allowed.end(), value) != allowed.end();
    };
    return entry != nullptr && contains(expected.types, entry->view->type) &&
           contains(expected.shapes, entry->view->shape);
  }

  void Add(Item item, std::vector<std::string> names) {
    for (const std::string& name : names) {
      taken_.insert(name);
      item.num_bytes += static_cast<int64_t>(set_.Find(name)->view->data.size());
    }
    item.tensors = std::move(names);
    items_.push_back(std::move(item));
  }

  const CheckpointFiles& files_;
  const TensorSet& set_;
  const TensorSet* const first_;  // null for the first one itself
  std::set<std::string> taken_;
  std::vector<Item> items_;
};

}  // namespace

Verified VerifyTensors(const CheckpointFiles& files, int num_threads,
                       const std::function<void(int64_t)>& on_bytes) {
  std::vector<Item> items;
  for (const TensorSet& set : files.sets) {
    for (Item& item : ItemList(files, set).Make()) items.push_back(std::move(item));
  }
  Verified verified;
  for (const Item& item : items) {
    verified.num_tensors += static_cast<int64_t>(item.tensors.size());
    verified.num_bytes += item.num_bytes;
  }
  // The largest first, or the last thread would be left alone with one.
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.num_bytes > b.num_bytes; });
  std::atomic<size_t> next = 0;
  Mutex mu;
  const auto work = [&] {
    for (size_t i = next++; i < items.size(); i = next++) {
      std::vector<std::string> problems = ItemCheck(items[i], on_bytes).Run();
      for (const std::string& name : items[i].tensors) {
        DropPages(items[i].set->Find(name)->view->data);
      }
      if (problems.empty()) continue;
      const MutexLock lock(&mu);
      verified.problems.insert(verified.problems.end(), problems.begin(), problems.end());
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  std::sort(verified.problems.begin(), verified.problems.end());
  return verified;
}

}  // namespace wintserve::inspect
