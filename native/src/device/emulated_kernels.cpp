#include "device/emulated_kernels.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "device/emulator.h"

namespace edgemoe {
namespace {

// The function that is a kernel's text, null if there is none. KERNEL() specializes it.
template <Kernel kernel>
constexpr auto text_of = nullptr;

#include "../../gpu/kernels.inl"

template <class T>
EmulatedKernel::Parameter parameter() {
    if constexpr (std::is_pointer_v<T>)
        return {true, sizeof(T), alignof(std::remove_pointer_t<T>)};
    else
        return {false, sizeof(T), alignof(T)};
}

template <class T>
T value_of(const Argument& argument) {
    if constexpr (std::is_pointer_v<T>) {
        uint64_t address;
        std::memcpy(&address, argument.value, sizeof address);
        return static_cast<T>(emulator::host_pointer(address));
    } else {
        T value;
        std::memcpy(&value, argument.value, sizeof value);
        return value;
    }
}

template <class... Parameters>
EmulatedKernel make(void (*text)(Parameters...)) {
    return {{parameter<Parameters>()...}, [text](std::span<const Argument> arguments) -> std::function<void()> {
                return [&]<size_t... i>(std::index_sequence<i...>) {
                    return [text, values = std::tuple<Parameters...>(value_of<Parameters>(arguments[i])...)] {
                        std::apply(text, values);
                    };
                }(std::index_sequence_for<Parameters...>());
            }};
}

[[maybe_unused]] EmulatedKernel make(std::nullptr_t) { return {}; }

}  // namespace

const EmulatedKernel* emulated_kernel(Kernel kernel) {
    static const std::array kernels{
#define EDGEMOE_KERNEL(name, threads) make(text_of<Kernel::name>),
#include "../../gpu/kernel_list.h"
#undef EDGEMOE_KERNEL
    };
    const EmulatedKernel& found = kernels.at(static_cast<size_t>(kernel));
    return found.bind ? &found : nullptr;
}

const EmulatedKernel& check_launch(Kernel kernel, int groups, std::span<const Argument> arguments) {
    const auto refuse = [kernel](const std::string& why) { throw DeviceError(std::string(kernel_name(kernel)) + why); };
    const EmulatedKernel* text = emulated_kernel(kernel);
    if (!text) throw DeviceError("there is no text of kernel " + std::string(kernel_name(kernel)));
    const std::vector<EmulatedKernel::Parameter>& parameters = text->parameters;
    if (groups < 1) refuse(" is launched with " + std::to_string(groups) + " groups");
    if (arguments.size() != parameters.size())
        refuse(" has " + std::to_string(parameters.size()) + " arguments, not " + std::to_string(arguments.size()));
    for (size_t i = 0; i < arguments.size(); ++i)
        if (arguments[i].size != parameters[i].size)
            refuse(", argument " + std::to_string(i) + ": " + std::to_string(parameters[i].size) +
                   " bytes are wanted, not " + std::to_string(arguments[i].size));
    return *text;
}

}  // namespace edgemoe
