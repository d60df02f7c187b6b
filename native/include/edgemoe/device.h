// What has kernels, and memory that they see, of its own beside the processor: a GPU, or an emulation of one.
//
// The kernels are one text (native/gpu), compiled for every kind of device. A device is small: it holds memory, copies,
// launches kernels and says when they have finished. Which of them compute a step of a model is DeviceBackend's matter
// (src/backend/device).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "edgemoe/buffer.h"

namespace edgemoe {

// The device has failed, or does not do what is asked of it.
struct DeviceError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// There is none.
struct NoDeviceError : DeviceError {
    using DeviceError::DeviceError;
};
// It has no room for so much.
struct DeviceMemoryError : DeviceError {
    using DeviceError::DeviceError;
};

// All kernels there are, by name.
enum class Kernel : uint16_t {
#define EDGEMOE_KERNEL(name, threads) name,
#include "../../gpu/kernel_list.h"
#undef EDGEMOE_KERNEL
};
std::string_view kernel_name(Kernel kernel);
int kernel_threads(Kernel kernel);
Kernel kernel_from_name(std::string_view name);  // throws DeviceError

struct DeviceFacts {
    std::string name;      // as its maker calls it
    size_t memory = 0;     // bytes of it
    size_t available = 0;  // of these
    bool unified = false;  // it sees the host's memory
    std::string driver;    // and its version; empty where there is none
};

// An argument of a kernel: an address in the device's memory, or a struct (native/gpu/shapes.h) that is copied.
struct Argument {
    const void* value;
    size_t size;

    template <class T>
    static Argument of(const T& value) {
        static_assert(std::is_trivially_copyable_v<T>);
        return {&value, sizeof value};
    }
    template <class T>
    static Argument of(const Buffer<T>& buffer) {
        static_assert(sizeof buffer == sizeof(void*));
        return {&buffer, sizeof buffer};
    }
};

// Operations are asked for in order and are computed in that order; the device may be behind until wait(). Calls throw
// DeviceError; after one has, nothing that the device holds is to be relied on.
class Device {
  public:
    virtual ~Device() = default;

    virtual DeviceFacts facts() const = 0;

    // 256-byte aligned, of any content. Throws DeviceMemoryError. Given back by release(), which waits.
    virtual std::byte* allocate(size_t bytes) = 0;
    virtual void release(std::byte* memory) = 0;

    // Groups of as many threads as the kernel has. Arguments are copied during the call. At least one group.
    virtual void launch(Kernel kernel, int groups, std::span<const Argument> arguments) = 0;
    template <class... Arguments>
    void launch(Kernel kernel, int groups, const Arguments&... arguments) {
        const std::array<Argument, sizeof...(Arguments)> list{Argument::of(arguments)...};
        launch(kernel, groups, std::span<const Argument>(list));
    }

    // The host's bytes are copied during the call, so that they may change after it.
    virtual void write(std::byte* to, std::span<const std::byte> from) = 0;
    virtual void copy(std::byte* to, const std::byte* from, size_t bytes) = 0;  // the two do not overlap
    // Everything before it has been computed when it returns.
    virtual void read(std::span<std::byte> to, const std::byte* from) = 0;
    virtual void wait() = 0;

    // Beside all that, in an order of their own: bytes of the host that stay as they are until the upload is done, to
    // where nothing else reads or writes meanwhile. What is launched after done() has said so sees them. Uploads are
    // numbered from 1.
    virtual uint64_t upload(std::byte* to, std::span<const std::byte> from) = 0;
    virtual bool done(uint64_t upload) = 0;
    virtual void wait(uint64_t upload) = 0;

    // Memory of the host that many uploads come from: these take less time and do not hold up the caller, once the
    // device knows it. It stays where it is until unpin(). False where it cannot be pinned; it is as before then.
    virtual bool pin(std::span<std::byte>) { return false; }
    virtual void unpin(std::byte*) {}
};

}  // namespace edgemoe
