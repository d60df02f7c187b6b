// What the vector kernels are written with: 16 float lanes, whatever the width of registers. An instruction set gives a
// trait V (a struct in its own unnamed namespace, so that nothing instantiated with it is shared between files compiled
// with different flags):
//
//   F, I                      16 floats, 16 int32
//   zero set1 load load_n store store_n            (_n: the first n < 16 lanes; the others read as `fill`, default 0)
//   load_half load_half_n load_bf16 load_codes     from float16, bfloat16, int8
//   set1_half                                      one float16 broadcast
//   add sub mul div fma fms max min                max, min: the second operand where unordered or equal
//   keep(x, begin, end, other)                     x in lanes begin..end-1, otherwise `other`
//   unless_below(x, bound, other) unless_above     `other` where x < bound (x > bound), otherwise x
//   canonical                                      NaN -> the one canonical NaN
//   bits floats integers_to_float magnitudes       reinterpret and convert
//   add_i sub_i max_i shift_left shift_right       shift_right keeps the sign
//   fold_sum fold_max fold_sum_i fold_max_i        over the 16 lanes, by halves (8, 4, 2, 1)
//   store_half store_codes                         16 float16; 16 int8, the low bytes of an I
//   half_of half_to_float                          single values
//   dot_group<L, R, T>                             pack_vector.h
//   kAttendHeads, ...                              sizes of register tiles
//
// Operations and their order are those of the scalar kernels, which are the reference.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own intrinsics' deliberately undefined registers (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "edgemoe/kernels.h"

#define EDGEMOE_INLINE inline __attribute__((always_inline))
#define EDGEMOE_INLINE_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define EDGEMOE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define EDGEMOE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace edgemoe {
namespace {

// How far ahead a product with one token asks for weights. Less comes too late, much more is no longer in the caches
// when its turn comes; multiples of 4096 compete with the lines that are in use for the same places in the caches.
constexpr ptrdiff_t kAhead = 6400;

// Asks for the `lines` cache lines that lie kAhead behind `place`, into the second-level cache: processors let only a
// dozen or two into the first at a time, and ignore what is too much. So this is called with a few lines again and
// again, and leaves none out: a single line that is missing stops a product as long as many. Nothing is asked for from
// `end` on, which is where the rows of a call end, but for the lines of one call.
EDGEMOE_INLINE void fetch_ahead(const std::byte* place, int lines, const std::byte* end) {
    const std::byte* next = place + kAhead;
    if (next >= end) return;
    EDGEMOE_UNROLL
    for (int i = 0; i < lines; ++i) __builtin_prefetch(next + i * 64, 0, 2);
}

}  // namespace
}  // namespace edgemoe
