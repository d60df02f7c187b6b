// Large anonymous memory regions: what weights, caches and sequence state live in.
#pragma once

#include <cstddef>
#include <span>

namespace edgemoe {

// One mapping, 2 MiB aligned (so that a GPU can register it later), zero-filled, charged page by page when touched.
class Arena {
  public:
    Arena() = default;
    explicit Arena(size_t bytes);
    ~Arena();
    Arena(Arena&& other) noexcept;
    Arena& operator=(Arena&& other) noexcept;

    std::byte* data() const { return data_; }
    size_t size() const { return size_; }
    // Gives back the pages that lie within these bytes of it: what is read there afterwards are zeros, until written.
    void release(const std::byte* first, size_t bytes);

  private:
    std::byte* data_ = nullptr;
    size_t size_ = 0;
    void* mapping_ = nullptr;
    size_t mapped_ = 0;
};

}  // namespace edgemoe
