#include "tools/quantizer/output/output_dir.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <iterator>
#include <optional>
#include <utility>

#include "common/check.h"
#include "common/read_file.h"
#include "common/status_macros.h"
#include "tools/quantizer/output/disk.h"

namespace wintserve::quantizer {
namespace {

namespace fs = std::filesystem;

constexpr char kJournal[] = "quantize-journal.json";
constexpr int64_t kStatBlockBytes = 512;        // of st_blocks, on any file system
constexpr int64_t kSmallFilesBytes = 32 << 20;  // tokenizer, index and the like, about

// Where the system would put it: ".." after a link is the parent of what it leads to, and neither a
// slash nor a dot at the end is a name.
fs::path Resolved(const fs::path& path) {
  std::error_code error;
  fs::path absolute = fs::absolute(path, error);
  if (error) return path;  // no working directory: the first system call says so
  while (absolute.has_relative_path() && (!absolute.has_filename() || absolute.filename() == ".")) {
    absolute = absolute.parent_path();
  }
  const bool is_name = absolute.has_filename() && absolute.filename() != "..";
  const fs::path parent = fs::weakly_canonical(is_name ? absolute.parent_path() : absolute, error);
  if (error) return absolute.lexically_normal();
  return is_name ? parent / absolute.filename() : parent;
}

fs::path ParentOf(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

// Whether there is nothing but what WriteJournal may leave before it is done.
bool HoldsNothing(const fs::path& partial) {
  std::error_code error;
  const fs::directory_iterator entries(partial, error);
  return !error && std::all_of(begin(entries), end(entries), [&](const fs::directory_entry& entry) {
    return entry.path() == UnnamedPath(partial / kJournal);
  });
}

}  // namespace

fs::path OutputDir::PartialPath(const fs::path& output) {
  return Resolved(output).string() + ".partial";
}

absl::StatusOr<OutputDir> OutputDir::Open(const fs::path& output, const OutputPlan& plan,
                                          RunIdentity identity, bool overwrite_partial) {
  OutputDir dir;
  dir.output_ = Resolved(output);
  dir.partial_ = PartialPath(output);
  dir.identity_ = std::move(identity);
  dir.digest_.reset(XXH3_createState());
  XXH3_64bits_reset(dir.digest_.get());
  dir.num_steps_ = static_cast<int64_t>(plan.steps.size());
  for (const PlannedFile& file : plan.files) dir.file_bytes_.push_back(file.size_bytes);
  std::error_code error;
  RETURN_IF_ERROR(dir.CheckOutputIsFree());
  if (fs::exists(fs::symlink_status(dir.partial_, error))) {
    RETURN_IF_ERROR(dir.Resume(overwrite_partial));
  }
  if (!dir.lock_.valid()) RETURN_IF_ERROR(dir.Begin(plan));
  // Another process may have finished it until we had the lock.
  if (const absl::Status status = dir.CheckOutputIsFree(); !status.ok()) {
    dir.RemoveIfNothingIsDone();
    return status;
  }
  RETURN_IF_ERROR(dir.WithNeeds(dir.OpenFiles(plan)));
  return dir;
}

absl::Status OutputDir::CheckOutputIsFree() const {
  std::error_code error;
  if (!fs::exists(fs::symlink_status(output_, error))) return absl::OkStatus();
  return absl::AlreadyExistsError(
      fmt::format("{}: is there already; remove it or name another output", output_.string()));
}

// Leaves lock_ empty where the directory is removed.
absl::Status OutputDir::Resume(bool overwrite_partial) {
  RETURN_IF_ERROR(Lock());
  const auto refuse = [&](std::string_view reason) {
    return absl::FailedPreconditionError(fmt::format("{}: {}", partial_.string(), reason));
  };
  const absl::StatusOr<std::string> text = ReadFile(partial_ / kJournal);
  if (!text.ok()) {
    if (HoldsNothing(partial_)) {  // a run that ended before its first journal
      lock_.Reset();
      return absl::OkStatus();
    }
    return refuse(
        "is there already and is no output of `wintserve quantize`; remove it, or name "
        "another output");
  }
  if (overwrite_partial) {
    std::error_code error;
    fs::remove_all(partial_, error);
    if (error) return refuse("cannot be removed: " + error.message());
    lock_.Reset();
    return absl::OkStatus();
  }
  std::optional<Journal> journal = ParseJournal(*text);
  const std::string differences =
      journal.has_value() ? Differences(journal->identity, identity_) : "";
  if (!differences.empty()) {
    return refuse(
        fmt::format("was begun by another run: {}; give the same to go on, or "
                    "--overwrite-partial to begin anew",
                    differences));
  }
  if (!journal.has_value() || std::ssize(journal->digests) > num_steps_) {
    return refuse(fmt::format("{} is damaged; --overwrite-partial begins anew", kJournal));
  }
  digests_ = std::move(journal->digests);
  num_steps_before_ = std::ssize(digests_);
  notes_before_ = std::move(journal->notes);
  return absl::OkStatus();
}

absl::Status OutputDir::Begin(const OutputPlan& plan) {
  const fs::path parent = ParentOf(partial_);
  std::error_code error;
  fs::create_directories(parent, error);
  if (error) return SystemError(error.value(), parent, "cannot be made");
  RETURN_IF_ERROR(CheckSpace(parent, plan.file_bytes() + kSmallFilesBytes));
  if (::mkdir(partial_.c_str(), 0777) != 0 && (errno != EEXIST || !HoldsNothing(partial_))) {
    return SystemError(errno, partial_, "cannot be made");
  }
  RETURN_IF_ERROR(SyncDirectory(parent));
  RETURN_IF_ERROR(Lock());
  // First of all, so that whatever is there is known to be ours.
  return WriteJournal(nullptr);
}

absl::Status OutputDir::Lock() {
  lock_.Reset(::open(partial_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!lock_.valid()) return SystemError(errno, partial_, "cannot be opened");
  const auto is_taken = [&] {
    return absl::FailedPreconditionError(
        fmt::format("{}: another process is writing it", partial_.string()));
  };
  if (::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    return errno == EWOULDBLOCK ? is_taken() : SystemError(errno, partial_, "cannot be locked");
  }
  // Between the two calls whoever had the lock may have renamed or removed what it was on.
  struct stat locked = {};
  struct stat found = {};
  if (::fstat(lock_.get(), &locked) != 0) return SystemError(errno, partial_, "cannot be read");
  const bool is_there = ::stat(partial_.c_str(), &found) == 0 && found.st_dev == locked.st_dev &&
                        found.st_ino == locked.st_ino;
  return is_there ? absl::OkStatus() : is_taken();
}

absl::Status OutputDir::OpenFiles(const OutputPlan& plan) {
  for (const PlannedFile& file : plan.files) {
    const fs::path path = partial_ / file.name;
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666));
    if (!fd.valid()) return SystemError(errno, path, "cannot be made");
    struct stat info = {};
    if (::fstat(fd.get(), &info) != 0) return SystemError(errno, path, "cannot be read");
    if (num_steps_before_ > 0 && info.st_size != file.size_bytes) {
      return absl::FailedPreconditionError(
          fmt::format("{}: has {} bytes where the earlier run left {}; --overwrite-partial begins "
                      "anew",
                      path.string(), info.st_size, file.size_bytes));
    }
    // Reserved now, the space cannot be missing after hours.
    int error;
    do {
      error = ::posix_fallocate(fd.get(), 0, file.size_bytes);
    } while (error == EINTR);
    if (error == EOPNOTSUPP || error == EINVAL) {
      if (::ftruncate(fd.get(), file.size_bytes) != 0) {
        return SystemError(errno, path, "cannot be made as large as it will be");
      }
    } else if (error != 0) {
      return SystemError(error, path, "cannot be made as large as it will be");
    }
    RETURN_IF_ERROR(WriteAll(
        fd.get(), {reinterpret_cast<const uint8_t*>(file.header.data()), file.header.size()}, 0,
        path));
    files_.push_back(std::move(fd));
    file_names_.push_back(file.name);
    is_dirty_.push_back(true);
  }
  const std::string index = plan.IndexJson();
  if (index.empty()) return absl::OkStatus();
  return WriteAtomically(partial_ / "model.safetensors.index.json", index);
}

absl::Status OutputDir::WriteText(const std::string& name, const std::string& text) {
  return WithNeeds(WriteAtomically(partial_ / name, text));
}

absl::Status OutputDir::CopyFile(const fs::path& source) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(source));
  return WriteText(source.filename().string(), text);
}

absl::Status OutputDir::WriteTensor(const PlannedTensor& tensor, std::span<const uint8_t> bytes) {
  CHECK(static_cast<int64_t>(bytes.size()) == tensor.size_bytes, "{}", tensor.name);
  CHECK(XXH3_64bits_update(digest_.get(), bytes.data(), bytes.size()) == XXH_OK);
  const int fd = files_[tensor.file].get();
  is_dirty_[tensor.file] = true;
  RETURN_IF_ERROR(
      WithNeeds(WriteAll(fd, bytes, tensor.offset, partial_ / file_names_[tensor.file])));
  // The disk may begin now, while the next matrix is made, so that Commit has less to wait for.
  ::sync_file_range(fd, tensor.offset, tensor.size_bytes, SYNC_FILE_RANGE_WRITE);
  return absl::OkStatus();
}

void OutputDir::EndStep() {
  digests_.push_back(XXH3_64bits_digest(digest_.get()));
  CHECK(std::ssize(digests_) <= num_steps_);
  XXH3_64bits_reset(digest_.get());
}

absl::Status OutputDir::CheckStep(int64_t index, const PlannedStep& step) {
  constexpr size_t kPieceBytes = 1 << 20;
  std::vector<uint8_t> piece;
  for (const PlannedTensor& tensor : step.tensors) {
    const fs::path path = partial_ / file_names_[tensor.file];
    for (int64_t done = 0; done < tensor.size_bytes; done += std::ssize(piece)) {
      piece.resize(std::min<size_t>(kPieceBytes, tensor.size_bytes - done));
      RETURN_IF_ERROR(ReadAll(files_[tensor.file].get(), piece, tensor.offset + done, path));
      CHECK(XXH3_64bits_update(digest_.get(), piece.data(), piece.size()) == XXH_OK);
    }
  }
  const uint64_t digest = XXH3_64bits_digest(digest_.get());
  XXH3_64bits_reset(digest_.get());
  if (digest == digests_[index]) return absl::OkStatus();
  return absl::FailedPreconditionError(
      fmt::format("{}: {} is not what the earlier run wrote; --overwrite-partial begins anew",
                  partial_.string(), step.name));
}

absl::Status OutputDir::Commit(const nlohmann::json& notes) {
  if (!sync_error_.ok()) return sync_error_;
  for (size_t i = 0; i < files_.size(); ++i) {
    if (!is_dirty_[i]) continue;
    if (::fsync(files_[i].get()) != 0) {
      // The system tells of pages that it could not write once, and takes them for written.
      sync_error_ =
          WithNeeds(SystemError(errno, partial_ / file_names_[i], "cannot be synchronised"));
      return sync_error_;
    }
    is_dirty_[i] = false;
  }
  return WriteJournal(notes);
}

absl::Status OutputDir::WriteJournal(const nlohmann::json& notes) {
  return WithNeeds(WriteAtomically(partial_ / kJournal, JournalText({identity_, digests_, notes})));
}

absl::Status OutputDir::WithNeeds(const absl::Status& status) const {
  if (!absl::IsResourceExhausted(status)) return status;
  int64_t missing_bytes = 0;
  for (size_t i = 0; i < file_bytes_.size(); ++i) {
    struct stat info = {};
    const bool is_there = i < files_.size() && ::fstat(files_[i].get(), &info) == 0;
    const int64_t there = is_there ? int64_t{info.st_blocks} * kStatBlockBytes : 0;
    missing_bytes += std::max<int64_t>(0, file_bytes_[i] - there);
  }
  return absl::ResourceExhaustedError(fmt::format(
      "{}; the output needs {} more; once there is room, the same command goes on",
      std::string(status.message()), missing_bytes == 0 ? "a little" : SizeText(missing_bytes)));
}

void OutputDir::RemoveIfNothingIsDone() {
  if (num_steps_before_ > 0) return;
  std::error_code error;
  fs::remove_all(partial_, error);  // what stays is an output that another run begins anew
}

absl::Status OutputDir::Finish() {
  RETURN_IF_ERROR(SyncDirectory(partial_));
  // Never over a directory that somebody has made meanwhile, an empty one either.
  if (::renameat2(AT_FDCWD, partial_.c_str(), AT_FDCWD, output_.c_str(), RENAME_NOREPLACE) != 0 &&
      (errno != EINVAL || ::rename(partial_.c_str(), output_.c_str()) != 0)) {
    return SystemError(errno, partial_, fmt::format("cannot be renamed to {}", output_.string()));
  }
  RETURN_IF_ERROR(SyncDirectory(ParentOf(output_)));
  ::unlink((output_ / kJournal).c_str());
  return absl::OkStatus();
}

}  // namespace wintserve::quantizer
