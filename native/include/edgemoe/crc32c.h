// CRC32C (Castagnoli), the checksum of pack sections and indexes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace edgemoe {

// Continues `crc` (0 to begin) over `bytes`. Uses the processor's CRC instruction where there is one.
uint32_t crc32c(std::span<const std::byte> bytes, uint32_t crc = 0);

}  // namespace edgemoe
