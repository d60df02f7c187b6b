// What the native tests share. They need neither Python nor a test framework, so that they run under emulators and
// sanitizers (tools/native_tests.py).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace edgemoe::tests {

using Random = std::mt19937;

inline int pick(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

inline void check(bool condition, const std::string& what) {
    if (!condition) throw std::runtime_error(what);
}

// Runs `body`, which must throw an Error.
template <class Error, class Body>
void check_throws(Body&& body, const std::string& what) {
    try {
        body();
    } catch (const Error&) {
        return;
    }
    throw std::runtime_error(what + " did not throw");
}

// Elements at an address that is a multiple of 64. Their end is that of a page, but for what makes up that multiple,
// and the next page cannot be read: vector kernels that go beyond are caught without a sanitizer, which takes minutes
// to compile them.
template <class T>
class Aligned {
  public:
    explicit Aligned(size_t size) : size_(size) {
        const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
        const size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
        mapped_ = (bytes + page - 1) / page * page + page;
        void* mapping = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(mapping != MAP_FAILED, "there is no memory");
        mapping_ = static_cast<std::byte*>(mapping);
        check(::mprotect(mapping_ + mapped_ - page, page, PROT_NONE) == 0, "a page cannot be protected");
        data_ = reinterpret_cast<T*>(mapping_ + mapped_ - page - bytes);
        std::memset(static_cast<void*>(data_), 0xA5, bytes);
    }
    ~Aligned() {
        if (mapping_) ::munmap(mapping_, mapped_);
    }
    Aligned(Aligned&& other) noexcept
        : size_(other.size_),
          mapped_(other.mapped_),
          mapping_(std::exchange(other.mapping_, nullptr)),
          data_(other.data_) {}
    Aligned& operator=(Aligned&&) = delete;

    T* data() const { return data_; }
    size_t size() const { return size_; }
    T& operator[](size_t i) const { return data_[i]; }
    std::span<T> span() const { return {data(), size_}; }

  private:
    size_t size_;
    size_t mapped_ = 0;
    std::byte* mapping_ = nullptr;
    T* data_ = nullptr;
};

template <class T>
void check_same(const Aligned<T>& expected, const Aligned<T>& actual, const std::string& what) {
    for (size_t i = 0; i < expected.size(); ++i)
        if (std::memcmp(&expected[i], &actual[i], sizeof(T)) != 0)
            throw std::runtime_error(what + ": element " + std::to_string(i) + " of " +
                                     std::to_string(expected.size()) + " is " + std::to_string(actual[i]) +
                                     " instead of " + std::to_string(expected[i]));
}

// A file of its own in the temporary folder, deleted with the object.
class TemporaryFile {
  public:
    explicit TemporaryFile(std::span<const std::byte> content) {
        static int number = 0;
        const std::string name = "edgemoe-tests-" + std::to_string(::getpid()) + "-" + std::to_string(number++);
        path_ = (std::filesystem::temp_directory_path() / name).string();
        write(content);
    }
    ~TemporaryFile() { std::filesystem::remove(path_); }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;

    void write(std::span<const std::byte> content) const {
        std::ofstream stream(path_, std::ios::binary | std::ios::trunc);
        stream.write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
        check(stream.good(), path_ + " could not be written");
    }
    const std::string& path() const { return path_; }

  private:
    std::string path_;
};

}  // namespace edgemoe::tests
