// The choice of a table at run time.
#include <cstdlib>
#include <stdexcept>
#include <string>

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
