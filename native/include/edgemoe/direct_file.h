// Reads of model files that leave no page cache behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

namespace edgemoe {

inline constexpr uint64_t kDiskBlock = 4096;  // offsets, lengths and addresses of direct reads are multiples of it

// A read failed or came up short. The message names the file and the offset.
struct IoError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// One open model file. O_DIRECT on Linux, F_NOCACHE on macOS; where a filesystem refuses direct reads, buffered reads
// whose pages are dropped right after (`direct()` tells).
class DirectFile {
  public:
    explicit DirectFile(const std::string& path);
    ~DirectFile();
    DirectFile(const DirectFile&) = delete;
    DirectFile& operator=(const DirectFile&) = delete;

    // Reads target.size() bytes at `offset`; all three block-aligned. At least `needed` of them must come from the
    // file, the rest may lie beyond its end. Safe to call from several threads.
    void read(uint64_t offset, std::span<std::byte> target, uint64_t needed) const {
        read(offset, std::span<const std::span<std::byte>>(&target, 1), needed);
    }
    // The same into several places, one after the other: one system call if it reads everything at once.
    void read(uint64_t offset, std::span<const std::span<std::byte>> targets, uint64_t needed) const;
    static constexpr size_t kTargets = 16;  // at most

    bool direct() const { return direct_; }
    uint64_t size() const { return size_; }
    const std::string& path() const { return path_; }

  private:
    std::string path_;
    int descriptor_ = -1;
    bool direct_ = false;
    uint64_t size_ = 0;
};

}  // namespace edgemoe
