// Runs the workgroups of a kernel (native/gpu) on the processor, to the bit as a GPU does, and finds what a GPU does
// not promise.
//
// Every thread is a fiber, which switches where the threads of a warp or of a group wait for each other. Between two
// barriers a warp runs as far as it gets before the next one begins, in an order that can be chosen, and so do the
// lanes of a warp: where a barrier is missing, some order gives other results. Under ThreadSanitizer the fibers are
// threads of their own, which only barriers order: not shuffles, and not that one group runs after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "edgemoe/emulated_device.h"

namespace edgemoe::emulator {

class Machine {
  public:
    explicit Machine(WarpOrder order, uint32_t seed = 0);
    ~Machine();

    // Calls `kernel` once for every thread of every group, a multiple of 32 threads each. Throws DeviceError where a
    // barrier is not reached by all threads of a group, a shuffle not by all lanes of a warp, or the kernel has more
    // shared memory than any GPU promises; and what the kernel throws.
    void run(int groups, int threads, const std::function<void()>& kernel);

    struct State;

  private:
    std::unique_ptr<State> state_;
};

// What device memory is told from the host's by: no address of a process has this bit, so that the host crashes where
// it reads one.
inline constexpr uint64_t kDeviceBit = uint64_t{1} << 62;

inline uint64_t device_address(const std::byte* memory) { return reinterpret_cast<uintptr_t>(memory) | kDeviceBit; }

// Throws DeviceError if it is no address of the device; 0 is null.
void* host_pointer(uint64_t address);

// --- for kernels (native/gpu/dialect.h) while they run. `site` is a number of the place in the text.

int group();
int thread();
void barrier(int site);
uint32_t shuffle_xor(uint32_t value, int mask);

// Of the group, with every byte 0xFF at first: not a number.
void* shared_bytes(int site, size_t bytes);

template <class T>
T* shared(int site, size_t count) {
    return static_cast<T*>(shared_bytes(site, count * sizeof(T)));
}

}  // namespace edgemoe::emulator
