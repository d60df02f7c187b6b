#include "edgemoe/memory.h"

#include <cstring>

namespace edgemoe {

void HostMemory::write(std::byte* to, std::span<const std::byte> from) {
    if (!from.empty()) std::memcpy(to, from.data(), from.size());
}

void HostMemory::read(std::span<std::byte> to, const std::byte* from) {
    if (!to.empty()) std::memcpy(to.data(), from, to.size());
}

void HostMemory::copy(std::byte* to, const std::byte* from, size_t bytes) {
    if (bytes) std::memcpy(to, from, bytes);
}

}  // namespace edgemoe
