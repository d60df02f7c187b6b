#include "edgemoe/kernel_speed.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "backend/cpu/blocks.h"
#include "edgemoe/arena.h"
#include "edgemoe/thread_pool.h"

#if defined(EDGEMOE_X86)
#include <immintrin.h>
#elif defined(EDGEMOE_NEON)
#include <arm_neon.h>
#endif

namespace edgemoe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

constexpr int kChains = 12;  // independent sums: more than an instruction takes cycles, fewer than there are registers
constexpr int kRounds = 4096;

// An empty statement that the compiler takes for a use and a change of x, so that neither the loop nor the order goes.
template <class T>
inline __attribute__((always_inline)) void keep(T& x) {
#if defined(EDGEMOE_X86)
    __asm__ __volatile__("" : "+v"(x));
#else
    __asm__ __volatile__("" : "+w"(x));
#endif
}

// Each gives the products of one round.
#if defined(EDGEMOE_X86)
__attribute__((target("avx2"))) uint64_t pairs_256() {
    __m256i sums[kChains / 2] = {}, weights = _mm256_set1_epi8(3), x = _mm256_set1_epi8(5);
    for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
        for (__m256i& sum : sums) {
            keep(weights);
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x));
            keep(sum);
        }
    }
    return uint64_t{kRounds} * (kChains / 2) * 32;
}

#if defined(EDGEMOE_AVXVNNI)
__attribute__((target("avx2,avxvnni"))) uint64_t quads_256() {
    __m256i sums[kChains] = {}, weights = _mm256_set1_epi8(3), x = _mm256_set1_epi8(5);
    for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
        for (__m256i& sum : sums) {
            sum = _mm256_dpbusd_avx_epi32(sum, weights, x);
            keep(sum);
        }
    }
    return uint64_t{kRounds} * kChains * 32;
}
#endif

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) uint64_t quads_512() {
    __m512i sums[kChains] = {}, weights = _mm512_set1_epi8(3), x = _mm512_set1_epi8(5);
    for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
        for (__m512i& sum : sums) {
            sum = _mm512_dpbusd_epi32(sum, weights, x);
            keep(sum);
        }
    }
    return uint64_t{kRounds} * kChains * 64;
}
#elif defined(EDGEMOE_NEON)
uint64_t products_128() {
    int16x8_t sums[kChains] = {};
    const int8x8_t weights = vdup_n_s8(3), x = vdup_n_s8(5);
    for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
        for (int16x8_t& sum : sums) {
            sum = vmlal_s8(sum, weights, x);
            keep(sum);
        }
    }
    return uint64_t{kRounds} * kChains * 8;
}
#endif

using Loop = uint64_t (*)();

Loop byte_products(std::string_view isa) {
#if defined(EDGEMOE_X86)
    if (isa == "avx2") return pairs_256;
#if defined(EDGEMOE_AVXVNNI)
    if (isa == "avxvnni") return quads_256;
#endif
    if (isa == "avx512vnni") return quads_512;
#elif defined(EDGEMOE_NEON)
    if (isa == "neon") return products_128;
#endif
    return nullptr;
}

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

KernelSpeed product_speed(const Kernels& kernels, const Matrix& shape, int tokens, int threads, uint64_t memory,
                          double seconds) {
    const int rows = shape.rows, cols = shape.cols;
    const size_t information = block_bytes(shape) * row_blocks(rows);
    // A matrix's levels lie one after the other, each in memory of its own.
    std::array<size_t, kMaxLevels> begins{};
    size_t bytes = aligned(information);
    if (shape.layout == Layout::nested) {
        bytes = 0;
        for (int level = 0; level < shape.levels.count; ++level) {
            begins[level] = bytes;
            const StoredLayout stored{Layout::nested, false, shape.levels.bits[level], level > 0, shape.levels.later};
            bytes += aligned(stored_bytes(stored, rows, cols));
        }
    }
    const int matrices = static_cast<int>(std::max<uint64_t>(memory / bytes, 1));
    const Arena weights(bytes * matrices);
    // Bytes of 32 to 47: as float16, bfloat16 and float32 ordinary numbers, none of them so small that it is slow.
    // The scales of nested levels, which lie in the top bits of bytes, are zero.
    uint64_t random = 1;
    for (size_t i = 0; i < weights.size(); i += sizeof random) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        const uint64_t word = ((random ^ random >> 32) & 0x0F0F0F0F0F0F0F0Fu) | 0x2020202020202020u;
        std::memcpy(weights.data() + i, &word, sizeof word);
    }
    const size_t inputs = static_cast<size_t>(tokens), per_token = column_groups(cols);
    std::vector<float> values(inputs * cols), scales(inputs * per_token), sums(inputs * per_token);
    std::vector<float> outputs(inputs * rows);
    const Arena codes(inputs * per_token * kGroup);
    auto* code = reinterpret_cast<int8_t*>(codes.data());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * 37 % 101) / 50 - 1;
    for (size_t t = 0; t < inputs; ++t)
        kernels.quantize({values.data() + t * cols, static_cast<size_t>(cols)}, code + t * per_token * kGroup,
                         scales.data() + t * per_token, sums.data() + t * per_token);
    const Activations input{values.data(), cols, code, scales.data(), sums.data()};

    ThreadPool pool(threads);
    const int step = blocks_per_item(shape, tokens), items = (row_blocks(rows) + step - 1) / step;
    const auto pass = [&] {
        pool.run(items * matrices, [&](int item) {
            Matrix matrix = shape;
            matrix.data = weights.data() + item / items * bytes;
            for (int level = 0; level < shape.levels.count; ++level)
                matrix.levels.data[level] = matrix.data + begins[level];
            const int first = item % items * step;
            kernels.matmul(matrix, input, {}, tokens, first, std::min(first + step, row_blocks(rows)), outputs.data(),
                           rows);
        });
    };
    pass();  // touches everything once
    KernelSpeed speed;
    const auto begin = Clock::now();
    do {
        pass();
        speed.bytes += information * matrices;
        speed.operations += uint64_t{2} * rows * cols * tokens * matrices;
        speed.seconds = seconds_since(begin);
    } while (speed.seconds < seconds);
    return speed;
}

KernelSpeed byte_product_speed(std::string_view isa, int threads, double seconds) {
    const Loop loop = byte_products(isa);
    if (!loop) return {};
    std::atomic<uint64_t> products{0};
    KernelSpeed speed;
    const auto begin = Clock::now();
    ThreadPool pool(threads);
    pool.run(threads, [&](int) {
        do products += loop();
        while (seconds_since(begin) < seconds);
    });
    speed.seconds = seconds_since(begin);
    speed.operations = 2 * products;
    return speed;
}

}  // namespace edgemoe
