// What does not depend on an instruction set: sizes, names, single rows, and the choice of a table at run time.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ggml_formats.h"
#include "half.h"
#include "nested_format.h"
#include "pack_format.h"
#include "tables.h"

#if defined(EDGEMOE_X86)
#include <cpuid.h>
#elif defined(EDGEMOE_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(EDGEMOE_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edgemoe {
namespace {

constexpr std::string_view kLayoutNames[] = {"f32",         "bf16",        "f16",        "q8g64",     "q4g64",
                                             "ggml.q4_0",   "ggml.q4_1",   "ggml.q5_0",  "ggml.q5_1", "ggml.q8_0",
                                             "ggml.q2_k",   "ggml.q3_k",   "ggml.q4_k",  "ggml.q5_k", "ggml.q6_k",
                                             "ggml.iq4_nl", "ggml.iq4_xs", "ggml.mxfp4", "nested"};

#if defined(EDGEMOE_X86)
// The compiler's feature bits include the operating system's support of the wide registers; F16C has none of its own
// in older compilers, and needs the same registers as AVX.
bool has_avx2() {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C);
}

#if defined(EDGEMOE_AVXVNNI)
// Older compilers have no name for it: leaf 7.1.
bool has_avxvnni() {
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

bool has_avx512vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#elif defined(EDGEMOE_NEON)
#if defined(__APPLE__)
bool has_feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
#endif

const std::vector<const Kernels*>& available_tables() {
    static const std::vector<const Kernels*> tables = [] {
        std::vector<const Kernels*> found{&kScalarKernels};
#if defined(EDGEMOE_X86)
        __builtin_cpu_init();
        if (has_avx2()) found.push_back(&kAvx2Kernels);
#if defined(EDGEMOE_AVXVNNI)
        if (has_avxvnni()) found.push_back(&kAvxVnniKernels);
#endif
        if (has_avx512vnni()) found.push_back(&kAvx512VnniKernels);
#elif defined(EDGEMOE_NEON)
        found.push_back(&kNeonKernels);
        if (has_dotprod()) found.push_back(&kNeonDotprodKernels);
        if (has_i8mm()) found.push_back(&kNeonI8mmKernels);
#endif
        return found;
    }();
    return tables;
}

}  // namespace

bool is_ggml(Layout layout) { return layout >= Layout::ggml_q4_0 && layout != Layout::nested; }

bool reads_codes(Layout layout) { return layout >= Layout::q8g64; }

size_t block_bytes(Layout layout, int cols) {
    const auto columns = static_cast<size_t>(cols);
    const size_t groups = (columns + kGroup - 1) / kGroup;
    switch (layout) {
        case Layout::f32:
            return columns * kRowBlock * sizeof(float);
        case Layout::bf16:
        case Layout::f16:
            return columns * kRowBlock * sizeof(uint16_t);
        case Layout::q8g64:
            return groups * (kQ8Codes + kGroupParameters);
        case Layout::q4g64:
            return groups * (kQ4Codes + kGroupParameters);
        default:
            return ggml_block_bytes(layout, cols);
    }
}

size_t block_bytes(const Matrix& matrix) {
    if (matrix.layout != Layout::nested) return block_bytes(matrix.layout, matrix.cols);
    size_t bytes = 0;
    for (int level = 0; level < matrix.levels.count; ++level)
        bytes += nested_block_bytes(matrix.levels, level, matrix.cols);
    return bytes;
}

size_t matrix_bytes(Layout layout, int rows, int cols) {
    return (static_cast<size_t>(rows) + kRowBlock - 1) / kRowBlock * block_bytes(layout, cols);
}

size_t kv_block_bytes(KvType type, int dim) {
    const size_t elements = static_cast<size_t>(dim) * kKvBlock;
    switch (type) {
        case KvType::f32:
            return elements * sizeof(float);
        case KvType::f16:
            return elements * sizeof(uint16_t);
        case KvType::q8_0:
            return elements + elements / kKvGroup * sizeof(uint16_t);
    }
    throw std::invalid_argument("unknown cache type number " + std::to_string(static_cast<int>(type)));
}

void dequantize_row(const Matrix& matrix, int row, float* out) {
    if (is_ggml(matrix.layout)) return ggml_dequantize_row(matrix, row, out);
    const std::byte* block = matrix.data + row / kRowBlock * block_bytes(matrix.layout, matrix.cols);
    const int lane = row % kRowBlock;
    const auto half_at = [](const std::byte* data, size_t index) {
        uint16_t value;
        std::memcpy(&value, data + index * sizeof value, sizeof value);
        return value;
    };
    const size_t code_bytes = matrix.layout == Layout::q8g64 ? kQ8Codes : kQ4Codes;
    for (int column = 0; column < matrix.cols; ++column) {
        const size_t index = static_cast<size_t>(column) * kRowBlock + lane;
        switch (matrix.layout) {
            case Layout::f32:
                std::memcpy(out + column, block + index * sizeof(float), sizeof(float));
                break;
            case Layout::bf16:
                out[column] = float_from_bf16(half_at(block, index));
                break;
            case Layout::f16:
                out[column] = float_from_half(half_at(block, index));
                break;
            case Layout::q8g64:
            case Layout::q4g64: {
                const std::byte* group = block + column / kGroup * (code_bytes + kGroupParameters);
                const int place = column % kGroup;
                int code;
                if (matrix.layout == Layout::q8g64) {
                    code = std::to_integer<int>(group[place / 4 * 64 + 4 * lane + place % 4]);
                } else {
                    const int byte = std::to_integer<int>(group[place / 8 * 64 + 4 * lane + place % 4]);
                    code = place % 8 < 4 ? byte & 15 : byte >> 4;
                }
                const float scale = float_from_half(half_at(group + code_bytes, lane));
                const float offset = float_from_half(half_at(group + code_bytes, kRowBlock + lane));
                out[column] = scale * static_cast<float>(code) + offset;  // the product is exact
                break;
            }
            default:
                break;
        }
    }
}

Layout layout_from_name(std::string_view name) {
    for (size_t i = 0; i < std::size(kLayoutNames); ++i)
        if (kLayoutNames[i] == name) return static_cast<Layout>(i);
    throw std::invalid_argument("unknown weight layout '" + std::string(name) + "'");
}

std::string_view layout_name(Layout layout) { return kLayoutNames[static_cast<size_t>(layout)]; }

std::vector<std::string_view> available_isas() {
    std::vector<std::string_view> names;
    for (const Kernels* table : available_tables()) names.push_back(table->name);
    return names;
}

const Kernels& select_kernels(std::string_view name) {
    if (name.empty()) {
        if (const char* wanted = std::getenv("EDGEMOE_ISA")) name = wanted;
    }
    if (name.empty()) return *available_tables().back();
    std::string known;
    for (const Kernels* table : available_tables()) {
        if (table->name == name) return *table;
        known += (known.empty() ? "" : ", ") + std::string(table->name);
    }
    throw std::invalid_argument("instruction set '" + std::string(name) +
                                "' is not available here; available: " + known);
}

}  // namespace edgemoe
