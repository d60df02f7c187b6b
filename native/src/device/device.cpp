// What is known of every kernel without a device.
#include "edgemoe/device.h"

namespace edgemoe {
namespace {

struct Entry {
    std::string_view name;
    int threads;
};

constexpr Entry kKernels[] = {
#define EDGEMOE_KERNEL(name, threads) {#name, threads},
#include "../../gpu/kernel_list.h"
#undef EDGEMOE_KERNEL
};

}  // namespace

std::string_view kernel_name(Kernel kernel) { return kKernels[static_cast<size_t>(kernel)].name; }
int kernel_threads(Kernel kernel) { return kKernels[static_cast<size_t>(kernel)].threads; }

Kernel kernel_from_name(std::string_view name) {
    for (size_t i = 0; i < std::size(kKernels); ++i)
        if (kKernels[i].name == name) return static_cast<Kernel>(i);
    throw DeviceError("there is no kernel " + std::string(name));
}

}  // namespace edgemoe
