// Addresses in a backend's memory, and how a piece of it is divided.
#pragma once

#include <concepts>
#include <cstddef>

namespace edgemoe {

// An address in the memory of a backend, counted in elements. During a pass only the backend looks behind it: on the
// CPU, and where memory is unified, it is a pointer; on a discrete GPU it is the device's address. Weights are written
// by the host while they are loaded, before there is a pass.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(T* address) : address_(address) {}
    template <class Other>
        requires std::convertible_to<Other*, T*>
    Buffer(Buffer<Other> other) : address_(other.address()) {}

    T* address() const { return address_; }
    explicit operator bool() const { return address_ != nullptr; }
    Buffer operator+(size_t elements) const { return Buffer(address_ + elements); }

  private:
    T* address_ = nullptr;
};

using Floats = Buffer<float>;
using ConstFloats = Buffer<const float>;  // activations that are read, and vectors of weights

// Divides a piece of memory into aligned buffers. Without a base it only measures: a plan and the memory it is for are
// made by the same code.
class Places {
  public:
    explicit Places(std::byte* base = nullptr) : base_(base) {}

    template <class T>
    void place(T*& pointer, size_t count) {
        constexpr size_t kAlignment = 64;
        pointer = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    }
    template <class T>
    void place(Buffer<T>& buffer, size_t count) {
        T* address;
        place(address, count);
        buffer = Buffer<T>(address);
    }
    size_t used() const { return used_; }

  private:
    std::byte* base_;
    size_t used_ = 0;
};

}  // namespace edgemoe
