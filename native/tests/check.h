// What the native tests share. They need neither Python nor a test framework, so that they run under emulators and
// sanitizers (tools/native_tests.py).
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
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

// Elements at an address that is a multiple of 64 and no more memory than they take, so that a sanitizer sees every
// access beyond them.
template <class T>
class Aligned {
  public:
    explicit Aligned(size_t size)
        : size_(size), data_(static_cast<T*>(::operator new[](size * sizeof(T), std::align_val_t{64}))) {
        std::memset(static_cast<void*>(data_.get()), 0xA5, size * sizeof(T));
    }
    T* data() const { return data_.get(); }
    size_t size() const { return size_; }
    T& operator[](size_t i) const { return data_.get()[i]; }
    std::span<T> span() const { return {data(), size_}; }
    std::span<const std::byte> bytes() const { return std::as_bytes(span()); }

  private:
    struct Delete {
        void operator()(T* data) const { ::operator delete[](static_cast<void*>(data), std::align_val_t{64}); }
    };
    size_t size_;
    std::unique_ptr<T[], Delete> data_;
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
