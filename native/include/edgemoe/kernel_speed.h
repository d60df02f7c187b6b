// How fast the kernels are here, and how fast the processor's byte products could be.
#pragma once

#include <cstdint>
#include <string_view>

#include "edgemoe/kernels.h"

namespace edgemoe {

// What a measurement did in `seconds`: reads of weights with their scales and offsets, and multiplications and
// additions counted as two operations.
struct KernelSpeed {
    uint64_t bytes = 0;
    uint64_t operations = 0;
    double seconds = 0;
};

// Multiplies matrices of the shape's layout, rows, columns and levels (its data is not used) by `tokens` inputs with so
// many threads, for about `seconds`. There are as many matrices as take `memory` bytes (at least one), used in turn, so
// that each comes from main memory if that is more than the caches; with one they are in them. The weights are
// arbitrary numbers, the inputs quantized before.
KernelSpeed product_speed(const Kernels& kernels, const Matrix& shape, int tokens, int threads, uint64_t memory,
                          double seconds);

// Products of bytes added in 32 bits, in registers: the instruction that the table called `isa` uses, as many at a time
// as the processor takes. No operations where it is not known: scalar
// and NEON's dot products.
KernelSpeed byte_product_speed(std::string_view isa, int threads, double seconds);

}  // namespace edgemoe
