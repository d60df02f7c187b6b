// A device whose kernels the processor runs, thread by thread, to the bit as a GPU does (src/device/emulator.h). It is
// slow. It stands in for a GPU where there is none, and finds mistakes that a GPU would forgive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "edgemoe/device.h"

namespace edgemoe {

// In which order the warps of a group, and the lanes of a warp, take their turns. Results do not depend on it.
enum class WarpOrder : uint8_t { ascending, descending, shuffled };

struct EmulatedOptions {
    WarpOrder order = WarpOrder::ascending;
    uint32_t seed = 0;  // of the shuffled order
    bool eager = false;
    size_t memory = size_t{8} << 30;
};

// Nothing is computed before someone waits, or reads, unless it is `eager`: what is read too early is not there yet.
// Memory is not a number at first; its addresses are none of the host's, and a kernel is given no others. A mistake
// within a kernel, or a write beyond what was allocated, is thrown as DeviceError where somebody waits for it, and by
// everything after.
std::unique_ptr<Device> emulated_device(const EmulatedOptions& options = {});

}  // namespace edgemoe
