#include "tools/quantizer/output/output_dir.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <optional>

#include "common/check.h"
#include "common/read_file.h"
#include "common/status_macros.h"

namespace wintserve::quantizer {
namespace {

namespace fs = std::filesystem;

constexpr char kJournal[] = "quantize-journal.json";
constexpr int64_t kSmallFilesBytes = 32 << 20;  // tokenizer, index and the like, about

absl::Status SystemError(int error, const fs::path& path, std::string_view what) {
  const std::string text = fmt::format("{}: {}: {}", path.string(), what, std::strerror(error));
  const bool is_full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  return is_full ? absl::ResourceExhaustedError(text) : absl::UnknownError(text);
}

// A path's last part, whether it was given with a slash at its end or not.
fs::path WithoutSlash(const fs::path& path) {
  std::error_code error;  // no working directory: the path as it is
  fs::path absolute = fs::absolute(path, error).lexically_normal();
  if (error) absolute = path.lexically_normal();
  return absolute.has_filename() ? absolute : absolute.parent_path();
}

absl::Status SyncDirectory(const fs::path& path) {
  const UniqueFd directory(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory.valid() || ::fsync(directory.get()) != 0) {
    return SystemError(errno, path, "cannot be synchronised");
  }
  return absl::OkStatus();
}

absl::Status WriteAll(int fd, std::span<const uint8_t> bytes, int64_t offset,
                      const fs::path& path) {
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(fd, bytes.data(), bytes.size(), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return SystemError(errno, path, "cannot be written");
    bytes = bytes.subspan(written);
    offset += written;
  }
  return absl::OkStatus();
}

// The whole file, on the disk before it takes its name.
absl::Status WriteAtomically(const fs::path& path, std::string_view text) {
  const fs::path unnamed = path.string() + ".new";
  {
    const UniqueFd file(::open(unnamed.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    if (!file.valid()) return SystemError(errno, unnamed, "cannot be made");
    RETURN_IF_ERROR(WriteAll(
        file.get(), {reinterpret_cast<const uint8_t*>(text.data()), text.size()}, 0, unnamed));
    if (::fsync(file.get()) != 0) return SystemError(errno, unnamed, "cannot be synchronised");
  }
  if (::rename(unnamed.c_str(), path.c_str()) != 0) {
    return SystemError(errno, path, "cannot be replaced");
  }
  return SyncDirectory(path.parent_path());
}

struct Journal {
  RunIdentity identity;
  int64_t num_steps = 0;
  nlohmann::json notes;
};

// Nothing if it is not one.
std::optional<Journal> ParseJournal(const std::string& text) {
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("run") || !json["run"].is_array() ||
      !json.contains("steps_done") || !json["steps_done"].is_number_unsigned()) {
    return std::nullopt;
  }
  Journal journal;
  journal.num_steps = json["steps_done"].get<int64_t>();
  journal.notes = json.value("notes", nlohmann::json());
  for (const nlohmann::json& entry : json["run"]) {
    if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() || !entry[1].is_string()) {
      return std::nullopt;
    }
    journal.identity.emplace_back(entry[0], entry[1]);
  }
  return journal;
}

// "--scheme was wint2 and is wint4, …"
std::string Differences(const RunIdentity& before, const RunIdentity& now) {
  const auto find = [](const RunIdentity& identity, const std::string& name) {
    const auto it = std::find_if(identity.begin(), identity.end(),
                                 [&](const auto& entry) { return entry.first == name; });
    return it == identity.end() ? std::string("not given") : it->second;
  };
  std::vector<std::string> names;
  for (const RunIdentity* identity : {&before, &now}) {
    for (const auto& [name, value] : *identity) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
  }
  std::string text;
  for (const std::string& name : names) {
    const std::string was = find(before, name);
    const std::string is = find(now, name);
    if (was == is) continue;
    text += fmt::format("{}{} was {} and is {}", text.empty() ? "" : ", ", name, was, is);
  }
  return text;
}

absl::Status CheckSpace(const fs::path& directory, int64_t needed_bytes) {
  struct statvfs info = {};
  if (::statvfs(directory.c_str(), &info) != 0) {
    return SystemError(errno, directory, "cannot be asked for its free space");
  }
  const int64_t free_bytes =
      static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
  if (free_bytes >= needed_bytes) return absl::OkStatus();
  constexpr double kGib = 1 << 30;
  return absl::ResourceExhaustedError(fmt::format(
      "{}: {:.2f} GiB are free, the output needs {:.2f} GiB", directory.string(),
      static_cast<double>(free_bytes) / kGib, static_cast<double>(needed_bytes) / kGib));
}

}  // namespace

fs::path OutputDir::PartialPath(const fs::path& output) {
  return WithoutSlash(output).string() + ".partial";
}

absl::StatusOr<OutputDir> OutputDir::Open(const fs::path& output, const OutputPlan& plan,
                                          RunIdentity identity, bool overwrite_partial) {
  OutputDir dir;
  dir.output_ = WithoutSlash(output);
  dir.partial_ = PartialPath(output);
  dir.identity_ = std::move(identity);
  dir.num_steps_ = static_cast<int64_t>(plan.steps.size());
  std::error_code error;
  if (fs::exists(fs::symlink_status(dir.output_, error))) {
    return absl::AlreadyExistsError(fmt::format(
        "{}: is there already; remove it or name another output", dir.output_.string()));
  }
  if (fs::exists(fs::symlink_status(dir.partial_, error))) {
    RETURN_IF_ERROR(dir.Resume(overwrite_partial));
  }
  if (!dir.lock_.valid()) RETURN_IF_ERROR(dir.Begin(plan));
  RETURN_IF_ERROR(dir.OpenFiles(plan));
  return dir;
}

// Leaves lock_ empty where the directory is removed.
absl::Status OutputDir::Resume(bool overwrite_partial) {
  RETURN_IF_ERROR(Lock());
  const auto refuse = [&](std::string_view reason) {
    return absl::FailedPreconditionError(fmt::format("{}: {}", partial_.string(), reason));
  };
  const absl::StatusOr<std::string> text = ReadFile(partial_ / kJournal);
  if (!text.ok()) {
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
  const std::optional<Journal> journal = ParseJournal(*text);
  if (!journal.has_value() || journal->num_steps < 0 || journal->num_steps > num_steps_) {
    return refuse(fmt::format("{} is damaged; --overwrite-partial begins anew", kJournal));
  }
  if (journal->identity != identity_) {
    return refuse(
        fmt::format("was begun by another run: {}; give the same to go on, or "
                    "--overwrite-partial to begin anew",
                    Differences(journal->identity, identity_)));
  }
  num_steps_before_ = journal->num_steps;
  notes_before_ = journal->notes;
  return absl::OkStatus();
}

absl::Status OutputDir::Begin(const OutputPlan& plan) {
  const fs::path parent = partial_.parent_path();
  std::error_code error;
  fs::create_directories(parent, error);
  if (error) return SystemError(error.value(), parent, "cannot be made");
  RETURN_IF_ERROR(CheckSpace(parent, plan.file_bytes() + kSmallFilesBytes));
  if (::mkdir(partial_.c_str(), 0777) != 0) {
    return SystemError(errno, partial_, "cannot be made");
  }
  RETURN_IF_ERROR(SyncDirectory(parent));
  RETURN_IF_ERROR(Lock());
  // First of all, so that whatever is there is known to be ours.
  return WriteJournal(0, nullptr);
}

absl::Status OutputDir::Lock() {
  lock_.Reset(::open(partial_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!lock_.valid()) return SystemError(errno, partial_, "cannot be opened");
  if (::flock(lock_.get(), LOCK_EX | LOCK_NB) == 0) return absl::OkStatus();
  if (errno == EWOULDBLOCK) {
    return absl::FailedPreconditionError(
        fmt::format("{}: another process is writing it", partial_.string()));
  }
  return SystemError(errno, partial_, "cannot be locked");
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
  return index.empty() ? absl::OkStatus() : WriteText("model.safetensors.index.json", index);
}

absl::Status OutputDir::WriteText(const std::string& name, const std::string& text) {
  return WriteAtomically(partial_ / name, text);
}

absl::Status OutputDir::CopyFile(const fs::path& source) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(source));
  return WriteText(source.filename().string(), text);
}

absl::Status OutputDir::WriteTensor(const PlannedTensor& tensor, std::span<const uint8_t> bytes) {
  CHECK(static_cast<int64_t>(bytes.size()) == tensor.size_bytes, "{}", tensor.name);
  const int fd = files_[tensor.file].get();
  is_dirty_[tensor.file] = true;
  RETURN_IF_ERROR(WriteAll(fd, bytes, tensor.offset, partial_ / file_names_[tensor.file]));
  // The disk may begin now, while the next matrix is made, so that Commit has less to wait for.
  ::sync_file_range(fd, tensor.offset, tensor.size_bytes, SYNC_FILE_RANGE_WRITE);
  return absl::OkStatus();
}

absl::Status OutputDir::Commit(int64_t num_steps, const nlohmann::json& notes) {
  if (!sync_error_.ok()) return sync_error_;
  for (size_t i = 0; i < files_.size(); ++i) {
    if (!is_dirty_[i]) continue;
    if (::fsync(files_[i].get()) != 0) {
      // The system tells of pages that it could not write once, and takes them for written.
      sync_error_ = SystemError(errno, partial_ / file_names_[i], "cannot be synchronised");
      return sync_error_;
    }
    is_dirty_[i] = false;
  }
  return WriteJournal(num_steps, notes);
}

absl::Status OutputDir::WriteJournal(int64_t num_steps, const nlohmann::json& notes) {
  nlohmann::json run = nlohmann::json::array();
  for (const auto& [name, value] : identity_) run.push_back({name, value});
  const nlohmann::json journal = {
      {"run", std::move(run)}, {"steps_done", num_steps}, {"notes", notes}};
  return WriteAtomically(partial_ / kJournal, journal.dump(2) + "\n");
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
  RETURN_IF_ERROR(SyncDirectory(output_.parent_path()));
  ::unlink((output_ / kJournal).c_str());
  return absl::OkStatus();
}

}  // namespace wintserve::quantizer
