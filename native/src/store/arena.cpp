#include "edgemoe/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <utility>

namespace edgemoe {
namespace {

constexpr size_t kAlignment = size_t{2} << 20;
constexpr size_t kLarge = 32 * kAlignment;

}  // namespace

Arena::Arena(size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    mapped_ = bytes + kAlignment;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
    flags |= MAP_NORESERVE;
#endif
    mapping_ = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapping_ == MAP_FAILED) {
        mapping_ = nullptr;
        throw std::bad_alloc();
    }
    const auto address = reinterpret_cast<uintptr_t>(mapping_);
    data_ = reinterpret_cast<std::byte*>((address + kAlignment - 1) / kAlignment * kAlignment);
#if defined(MADV_HUGEPAGE)
    // Large arenas hold weights that are read from one end to the other: fewer page faults, fewer misses of the address
    // cache. In small ones a huge page would be charged whole for its first byte.
    ::madvise(mapping_, mapped_, bytes >= kLarge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
}

Arena::~Arena() {
    if (mapping_) ::munmap(mapping_, mapped_);
}

void Arena::release(const std::byte* first, size_t bytes) {
    const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE)), address = reinterpret_cast<uintptr_t>(first);
    const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (begin >= end) return;
    auto* const pages = reinterpret_cast<void*>(begin);
#if defined(MADV_NOHUGEPAGE)
    ::madvise(pages, end - begin,
              MADV_NOHUGEPAGE);  // or the system would fill the holes up, for the sake of what is left
#endif
    ::madvise(pages, end - begin, MADV_DONTNEED);
}

Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapping_(std::exchange(other.mapping_, nullptr)),
      mapped_(std::exchange(other.mapped_, 0)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_, other.mapped_);
    return *this;
}

}  // namespace edgemoe
