// NVIDIA GPUs, through their driver's library, which is opened at run time: nothing of CUDA is needed to build this,
// nor to run it on a machine without a GPU.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "edgemoe/device.h"

namespace edgemoe {

inline constexpr const char* kCudaLibrary = "libcuda.so.1";

// The first GPU there is. The image is the kernels' PTX (tools/gpu_images.py), which the driver compiles for it. Throws
// DeviceError that says what is missing. The driver's library stays open once it has been.
std::unique_ptr<Device> open_cuda_device(std::string_view image, const std::string& library = kCudaLibrary);

}  // namespace edgemoe
