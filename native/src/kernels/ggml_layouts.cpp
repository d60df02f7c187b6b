// From the row-major blocks of a GGUF file to 16 interleaved rows: a transposition of small elements, without a change
// of size. SSE2 is part of every x86-64; it moves 16 bytes of four rows at a time, faster than memory delivers them.
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml_formats.h"
#include "nested_format.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace edgemoe {
namespace {

template <class T>
void move(const std::byte* source, std::byte* target) {
    std::memcpy(target, source, sizeof(T));
}

// target[i][row] = source[row][i] for 16 rows, `stride` bytes apart.
template <class T>
void transpose_plain(const std::byte* source, size_t stride, size_t count, std::byte* target) {
    for (int row = 0; row < kRowBlock; ++row)
        for (size_t i = 0; i < count; ++i)
            move<T>(source + row * stride + i * sizeof(T), target + (i * kRowBlock + row) * sizeof(T));
}

#if defined(__SSE2__)

__m128i load(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
void store(std::byte* p, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }

// Four elements of each row.
void transpose_4_words(const std::byte* source, size_t stride, std::byte* target) {
    for (int row = 0; row < kRowBlock; row += 4) {
        const std::byte* rows = source + row * stride;
        const __m128i a = load(rows);
        const __m128i b = load(rows + stride);
        const __m128i c = load(rows + 2 * stride);
        const __m128i d = load(rows + 3 * stride);
        const __m128i ab_low = _mm_unpacklo_epi32(a, b);
        const __m128i ab_high = _mm_unpackhi_epi32(a, b);
        const __m128i cd_low = _mm_unpacklo_epi32(c, d);
        const __m128i cd_high = _mm_unpackhi_epi32(c, d);
        std::byte* place = target + row * 4;
        store(place, _mm_unpacklo_epi64(ab_low, cd_low));
        store(place + 64, _mm_unpackhi_epi64(ab_low, cd_low));
        store(place + 128, _mm_unpacklo_epi64(ab_high, cd_high));
        store(place + 192, _mm_unpackhi_epi64(ab_high, cd_high));
    }
}

// Eight elements of each row.
void transpose_8_halves(const std::byte* source, size_t stride, std::byte* target) {
    for (int row = 0; row < kRowBlock; row += 8) {
        __m128i x[8], y[8];
        for (int i = 0; i < 8; ++i) x[i] = load(source + (row + i) * stride);
        for (int i = 0; i < 4; ++i) {
            y[2 * i] = _mm_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
            y[2 * i + 1] = _mm_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
        }
        for (int i = 0; i < 2; ++i)
            for (int half = 0; half < 2; ++half) {
                x[4 * i + 2 * half] = _mm_unpacklo_epi32(y[4 * i + half], y[4 * i + 2 + half]);
                x[4 * i + 2 * half + 1] = _mm_unpackhi_epi32(y[4 * i + half], y[4 * i + 2 + half]);
            }
        for (int i = 0; i < 4; ++i) {
            store(target + (2 * i) * 32 + row * 2, _mm_unpacklo_epi64(x[i], x[4 + i]));
            store(target + (2 * i + 1) * 32 + row * 2, _mm_unpackhi_epi64(x[i], x[4 + i]));
        }
    }
}

// What is left over at the end is done by one more step that overlaps the one before it.
template <class T>
void transpose(const std::byte* source, size_t stride, size_t count, std::byte* target) {
    constexpr size_t step = 16 / sizeof(T);
    if (count < step) return transpose_plain<T>(source, stride, count, target);
    for (size_t i = 0;; i += step) {
        if (i + step > count) {
            if (i == count) return;
            i = count - step;
        }
        if constexpr (sizeof(T) == 4)
            transpose_4_words(source + i * sizeof(T), stride, target + i * sizeof(T) * kRowBlock);
        else
            transpose_8_halves(source + i * sizeof(T), stride, target + i * sizeof(T) * kRowBlock);
    }
}

#else

template <class T>
void transpose(const std::byte* source, size_t stride, size_t count, std::byte* target) {
    transpose_plain<T>(source, stride, count, target);
}

#endif

// 16 rows of `row_bytes`, one after the other, into one row block.
void interleave_block(Layout layout, int cols, size_t row_bytes, const std::byte* source, std::byte* target) {
    if (layout == Layout::f32) return transpose<uint32_t>(source, row_bytes, static_cast<size_t>(cols), target);
    if (!is_ggml(layout)) return transpose<uint16_t>(source, row_bytes, static_cast<size_t>(cols), target);
    const GgmlFormat format = ggml_format(layout);
    const int blocks = cols / format.cols;
    for (int block = 0; block < blocks; ++block) {
        const std::byte* place = source + static_cast<ptrdiff_t>(block) * format.bytes();
        const GgmlPlace to = ggml_place(format, blocks, block);
        // Words that stay side by side; all of them in most layouts.
        const int run = layout == Layout::ggml_q6_k ? 4 : format.words;
        for (int word = 0; word < format.words; word += run)
            transpose<uint32_t>(place + format.words_at + word * 4, row_bytes, run,
                                target + to.words + ggml_word(layout, word) * 4 * kRowBlock);
        std::byte* parameters = target + to.parameters;
        for (int i = 0; i < format.parameters; ++i) {
            const std::byte* parameter = place + format.parameters_at + i * format.parameter_bytes;
            if (format.parameter_bytes == 1)
                transpose_plain<uint8_t>(parameter, row_bytes, 1, parameters);
            else
                transpose_plain<uint16_t>(parameter, row_bytes, 1, parameters);
            parameters += format.parameter_bytes * kRowBlock;
        }
    }
}

}  // namespace

size_t ggml_block_bytes(Layout layout, int cols) {
    const GgmlFormat format = ggml_format(layout);
    if (format.cols == 0) throw std::invalid_argument("unknown layout number " + std::to_string(int(layout)));
    if (cols <= 0 || cols % format.cols != 0)
        throw std::invalid_argument("a matrix of layout " + std::string(layout_name(layout)) + " has " +
                                    std::to_string(cols) + " columns, not a multiple of " +
                                    std::to_string(format.cols));
    return static_cast<size_t>(cols / format.cols) * format.bytes() * kRowBlock;
}

StoredLayout stored_layout(std::string_view name) {
    if (name == "ggml.f32") return {Layout::f32, true};
    if (name == "ggml.f16") return {Layout::f16, true};
    if (name == "ggml.bf16") return {Layout::bf16, true};
    // Every level has a bit at least, and all of them 8 at most.
    for (int bits = 1; bits <= kMaxLevels; ++bits) {
        for (int later = 0; bits + later <= kMaxLevels; ++later)
            if (const StoredLayout base{Layout::nested, false, bits, false, later}; name == stored_name(base))
                return base;
        if (const StoredLayout fine{Layout::nested, false, bits, true}; bits < kMaxLevels && name == stored_name(fine))
            return fine;
    }
    const Layout layout = layout_from_name(name);
    if (layout == Layout::nested) throw std::invalid_argument("layout nested is not stored as such");
    return {layout, is_ggml(layout)};
}

std::string stored_name(StoredLayout stored) {
    if (stored.layout == Layout::nested)
        return stored.refines ? "refine" + std::to_string(stored.level_bits)
                              : "base" + std::to_string(stored.level_bits) + "r" + std::to_string(stored.later);
    return (stored.row_major && !is_ggml(stored.layout) ? "ggml." : "") + std::string(layout_name(stored.layout));
}

size_t stored_bytes(StoredLayout stored, int rows, int cols) {
    if (stored.layout == Layout::nested)
        return (static_cast<size_t>(rows) + kRowBlock - 1) / kRowBlock *
               nested_block_bytes(stored.level_bits, stored.refines ? 0 : nested_parameters(stored.later), cols);
    if (!stored.row_major) return matrix_bytes(stored.layout, rows, cols);
    return block_bytes(stored.layout, cols) / kRowBlock * static_cast<size_t>(rows);
}

void interleave(Layout layout, int rows, int cols, const std::byte* source, std::byte* target, std::byte* scratch) {
    if (layout == Layout::q8g64 || layout == Layout::q4g64 || layout == Layout::nested)
        throw std::invalid_argument("layout " + std::string(layout_name(layout)) + " is interleaved as it is stored");
    const size_t bytes = block_bytes(layout, cols);
    const int blocks = (rows + kRowBlock - 1) / kRowBlock;
    // Each block is copied away before its place is written. Where the target lies behind the source the last block
    // goes first, so that no block is overwritten before its turn.
    const bool backwards = reinterpret_cast<uintptr_t>(target) > reinterpret_cast<uintptr_t>(source);
    for (int i = 0; i < blocks; ++i) {
        const int block = backwards ? blocks - 1 - i : i;
        const int present = rows - block * kRowBlock < kRowBlock ? rows - block * kRowBlock : kRowBlock;
        const size_t present_bytes = bytes / kRowBlock * static_cast<size_t>(present);
        std::memcpy(scratch, source + block * bytes, present_bytes);
        std::memset(scratch + present_bytes, 0, bytes - present_bytes);
        interleave_block(layout, cols, bytes / kRowBlock, scratch, target + block * bytes);
    }
}

std::byte* packed_scratch(size_t size) {
    constexpr size_t alignment = 64;
    thread_local std::vector<std::byte> memory;
    if (memory.size() < size + alignment) memory.resize(size + alignment);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (alignment - address % alignment) % alignment;
}

}  // namespace edgemoe
