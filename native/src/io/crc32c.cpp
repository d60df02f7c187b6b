#include "edgemoe/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace edgemoe {
namespace {

// Slicing by 8: table[k][b] is the CRC of byte b followed by k zero bytes.
constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
    std::array<std::array<uint32_t, 256>, 8> tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78u : 0u);
        tables[0][byte] = crc;
    }
    for (int k = 1; k < 8; ++k)
        for (int byte = 0; byte < 256; ++byte) {
            const uint32_t previous = tables[k - 1][byte];
            tables[k][byte] = (previous >> 8) ^ tables[0][previous & 0xff];
        }
    return tables;
}

constexpr auto kTables = make_tables();

uint32_t update_portable(const unsigned char* data, size_t size, uint32_t crc) {
    while (size >= 8) {
        uint64_t word;
        std::memcpy(&word, data, 8);
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; ++k) crc ^= kTables[7 - k][(word >> (8 * k)) & 0xff];
        data += 8;
        size -= 8;
    }
    for (; size; --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *data++) & 0xff];
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t update_sse42(const unsigned char* data, size_t size, uint32_t crc) {
    uint64_t state = crc;
    for (; size >= 8; data += 8, size -= 8) {
        uint64_t word;
        std::memcpy(&word, data, 8);
        state = _mm_crc32_u64(state, word);
    }
    crc = static_cast<uint32_t>(state);
    for (; size; --size) crc = _mm_crc32_u8(crc, *data++);
    return crc;
}
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
uint32_t update_arm(const unsigned char* data, size_t size, uint32_t crc) {
    for (; size >= 8; data += 8, size -= 8) {
        uint64_t word;
        std::memcpy(&word, data, 8);
        crc = __crc32cd(crc, word);
    }
    for (; size; --size) crc = __crc32cb(crc, *data++);
    return crc;
}
#endif

}  // namespace

uint32_t crc32c(std::span<const std::byte> bytes, uint32_t crc) {
    const auto* data = reinterpret_cast<const unsigned char*>(bytes.data());
    crc = ~crc;
#if defined(__x86_64__)
    static const bool has_instruction = __builtin_cpu_supports("sse4.2");
    crc = has_instruction ? update_sse42(data, bytes.size(), crc) : update_portable(data, bytes.size(), crc);
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
    crc = update_arm(data, bytes.size(), crc);
#else
    crc = update_portable(data, bytes.size(), crc);
#endif
    return ~crc;
}

}  // namespace edgemoe
