#include "edgemoe/direct_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

namespace edgemoe {
namespace {

[[noreturn]] void fail(const std::string& path, const std::string& what) { throw IoError(path + ": " + what); }

}  // namespace

DirectFile::DirectFile(const std::string& path) : path_(path) {
#if defined(O_DIRECT)
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    direct_ = descriptor_ >= 0;
#endif
    if (descriptor_ < 0) descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor_ < 0) fail(path, std::string("cannot be opened: ") + std::strerror(errno));
#if defined(F_NOCACHE)
    direct_ = ::fcntl(descriptor_, F_NOCACHE, 1) == 0;
#endif
    struct stat status{};
    if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
        ::close(descriptor_);
        fail(path, "is not a regular file");
    }
    size_ = static_cast<uint64_t>(status.st_size);
}

DirectFile::~DirectFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

void DirectFile::read(uint64_t offset, std::span<const std::span<std::byte>> targets, uint64_t needed) const {
    std::array<iovec, kTargets> left;
    const size_t count = targets.size();
    if (count > kTargets) throw std::invalid_argument("a read into " + std::to_string(count) + " places");
    uint64_t size = 0;
    for (size_t i = 0; i < count; ++i) {
        left[i] = {targets[i].data(), targets[i].size()};
        size += targets[i].size();
    }
    size_t first = 0;
    for (uint64_t done = 0; done < needed;) {
        const ssize_t got = ::preadv(descriptor_, left.data() + first, static_cast<int>(count - first),
                                     static_cast<off_t>(offset + done));
        if (got < 0) {
            if (errno == EINTR) continue;
            fail(path_, "read of " + std::to_string(size) + " bytes at offset " + std::to_string(offset) +
                            " failed: " + std::strerror(errno));
        }
        if (got == 0)
            fail(path_, "ends at " + std::to_string(offset + done) + ", " + std::to_string(needed - done) +
                            " bytes short of what its index promises");
        done += static_cast<uint64_t>(got);
        // A direct read can only go on at a block boundary; a partial one ends at the end of the file.
        if (direct_ && done < needed && (done % kDiskBlock) != 0)
            fail(path_, "short read at offset " + std::to_string(offset + done));
        for (auto rest = static_cast<size_t>(got); rest > 0;) {
            const size_t part = std::min(rest, left[first].iov_len);
            left[first].iov_base = static_cast<std::byte*>(left[first].iov_base) + part;
            left[first].iov_len -= part;
            rest -= part;
            if (left[first].iov_len == 0) ++first;
        }
    }
#if defined(POSIX_FADV_DONTNEED)
    if (!direct_)
        ::posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(size), POSIX_FADV_DONTNEED);
#endif
}

}  // namespace edgemoe
