// The kernels' text (native/gpu) as functions that the emulator runs.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "edgemoe/device.h"

namespace edgemoe {

struct EmulatedKernel {
    struct Parameter {
        bool address;  // otherwise a value of `size` bytes
        size_t size;
        size_t alignment;  // of what the address points to
    };
    std::vector<Parameter> parameters;
    // What a thread runs, with copies of the arguments, which fit the parameters.
    std::function<std::function<void()>(std::span<const Argument>)> bind;
};

// Null if there is no text of it yet.
const EmulatedKernel* emulated_kernel(Kernel kernel);

// That a kernel has such arguments, on whatever device: as many, of these sizes. Throws DeviceError.
const EmulatedKernel& check_launch(Kernel kernel, int groups, std::span<const Argument> arguments);

}  // namespace edgemoe
