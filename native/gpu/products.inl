// Activations as codes, and products with matrices of every layout (src/kernels/*_scalar.cpp, *_format*.h).
//
// A workgroup has 16 rows, a row block, and up to TILE_PAIRS pairs, so that a weight is read once for all of these.
// What is summed within a group of 64 columns are integers, exact however they are shared out; what is left of a
// product is one chain for each row and pair, whose links are added in ascending order: sum = fma(slope, term, sum).

#define WARPS 4
#define MOST_LINKS 2048  // in shared memory: of 16 rows, of all pairs

// A warp for each (row, group of 64 columns). Kernels::quantize.
KERNEL(quantize_rows, IN(0, float, x), OUT(1, i8, codes), OUT(2, float, scales), OUT(3, float, sums),
       ARG(4, QuantizeShape, shape), ARG(5, i32, rows)) {
    const int groups = (shape.cols + 63) / 64;
    const i64 index = i64(GROUP_ID) * WARPS + WARP;
    if (index >= i64(rows) * groups) return;
    const i64 row = index / groups;
    const int g = int(index % groups);
    const GLOBAL float* values = x + row * shape.stride + g * 64;
    const int columns = min(64, shape.cols - g * 64);
    const int column = 2 * LANE;
    const float first = column < columns ? values[column] : 0.0f;
    const float second = column + 1 < columns ? values[column + 1] : 0.0f;
    // Bits of the largest magnitude; a NaN's are above infinity's, those above every finite one's.
    i32 largest = max(i32(float_bits(magnitude_of(first))), i32(float_bits(magnitude_of(second))));
    for (int width = 16; width >= 1; width /= 2) largest = max(largest, shuffle_xor(largest, width));
    const float magnitude = bits_float(u32(largest));
    const float not_a_number = bits_float(0x7FC00000u);
    i32 first_code = 0, second_code = 0;
    float scale = 0.0f;
    if (largest >= 0x7F800000) {
        scale = not_a_number;
    } else if (largest >= 0x03FE0000) {  // 127 * 2^-126, the least whose scale is not subnormal
        const float inverse = 127.0f / magnitude;
        first_code = nearest(first * inverse);
        second_code = nearest(second * inverse);
        scale = magnitude / 127.0f;
    }
    i32 sum = first_code + second_code;
    for (int width = 16; width >= 1; width /= 2) sum += shuffle_xor(sum, width);
    GLOBAL i8* target = codes + index * 64;
    target[column] = i8(first_code);
    target[column + 1] = i8(second_code);
    if (LANE == 0) {
        scales[index] = scale;
        sums[index] = largest >= 0x7F800000 ? not_a_number : scale * float(sum);
    }
}

// What a lane has of a group of 64 columns: two parts of 16 columns of one row. Of half a group at a time, as lanes 0
// to 15 and lanes 16 to 31 of a warp do, or of half of each half, where two halves' codes lie in the same words.
struct Weights {
    u32 codes[8];            // four in each word, ascending; of part 0, then of part 1
    i32 step[2], offset[2];  // integer factors of each part: of its products, and of the sum of its activations' codes
    float scale, minimum, center;
};

// Four bytes below 128, each minus the same number.
FN u32 bytes_minus(u32 bytes, u32 number) { return ((bytes | 0x80808080u) - number * 0x01010101u) ^ 0x80808080u; }

// Bits 0 to 3 as four bytes.
FN u32 bits_as_bytes(u32 bits) { return ((bits & 15u) * 0x00204081u) & 0x01010101u; }

FN i32 byte_of(u32 word, int i) { return i32(word >> (8 * i) & 255u); }
FN i32 signed_nibble(u32 word, int shift) { return i32(word << (28 - shift)) >> 28; }

// --- layouts of packs (docs/format.md). Of lane `row` + 16 * `half`.

FN float group_parameter(const GLOBAL u32* parameters, int row) {
    return float_from_half(fetch(parameters + row / 2) >> (row % 2 * 16) & 0xFFFFu);
}

FN Weights q8g64_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const i64 groups = (cols + 63) / 64;
    const GLOBAL u32* group = ADDRESS(const u32, job.data) + (block * groups + g) * 272;
    Weights weights;
    UNROLL for (int i = 0; i < 8; ++i) weights.codes[i] = fetch(group + (half * 8 + i) * 16 + row);
    weights.scale = group_parameter(group + 256 + half * 8, row);
    return weights;
}

FN Weights q4g64_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const i64 groups = (cols + 63) / 64;
    const GLOBAL u32* group = ADDRESS(const u32, job.data) + (block * groups + g) * 144;
    Weights weights;
    UNROLL for (int i = 0; i < 4; ++i) {
        const u32 word = fetch(group + (half * 4 + i) * 16 + row);
        weights.codes[2 * i] = word & 0x0F0F0F0Fu;
        weights.codes[2 * i + 1] = word >> 4 & 0x0F0F0F0Fu;
    }
    weights.scale = group_parameter(group + 128 + half * 8, row);
    return weights;
}

// The four bytes that a row has in the parameters of a chunk's groups, two bits in each.
FN u32 nested_row_word(const GLOBAL u32* parameters, int row) {
    u32 word = 0u;
    UNROLL for (int j = 0; j < 4; ++j) word |= (fetch(parameters + j * 16 + row) >> 6 & 0x03030303u) << (2 * j);
    return word;
}

FN Weights nested_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const i64 groups = (cols + 63) / 64, chunks = (groups + 3) / 4;
    const int lines = 4 + max(job.parameters - 2 + 3, 0) / 4;  // of a chunk's parameters, 16 words each
    const i64 block_words = chunks * (lines * 16) + groups * (job.bits[0] * 32);
    const GLOBAL u32* parameters =
        ADDRESS(const u32, job.data) + block * block_words + g / 4 * (lines * 16 + job.bits[0] * 128);
    Weights weights;
    UNROLL for (int i = 0; i < 8; ++i) weights.codes[i] = 0u;
    for (int level = 0; level < job.levels; ++level) {
        int bits = job.bits[level];
        const GLOBAL u32* plane = level == 0
                                      ? parameters + lines * 16 + g % 4 * (bits * 32)
                                      : ADDRESS(const u32, job.later[level - 1]) + (block * groups + g) * (bits * 32);
        for (; bits >= 2; bits -= 2) {
            UNROLL for (int part = 0; part < 2; ++part) {
                const u32 word = fetch(plane + (2 * half + part) * 16 + row);
                UNROLL for (int i = 0; i < 4; ++i) weights.codes[4 * part + i] =
                    weights.codes[4 * part + i] << 2 | (word >> (2 * i) & 0x03030303u);
            }
            plane += 64;
        }
        if (bits != 0) {
            const u32 word = fetch(plane + half * 16 + row);
            UNROLL for (int part = 0; part < 2; ++part) UNROLL for (int i = 0; i < 4; ++i) weights.codes[4 * part + i] =
                weights.codes[4 * part + i] << 1 | (word >> (2 * i + part) & 0x01010101u);
        }
    }
    const u32 own = fetch(parameters + g % 4 * 16 + row);
    UNROLL for (int part = 0; part < 2; ++part) {
        const i32 packed = byte_of(own, 2 * half + part);
        weights.step[part] = 3 + (packed & 3);
        i32 offset = 8 * (((packed >> 3 & 7) ^ 4) - 4);
        if (job.levels == 1) offset += (packed >> 2 & 1) != 0 ? 3 : -3;
        weights.offset[part] = weights.step[part] * offset;
    }
    const u32 shared = nested_row_word(parameters, row);
    int below = job.bits[0];
    float scale = float_from_half(shared & 0xFFFFu);
    weights.minimum = scale * (float(1 << below) / 128.0f);
    float center = scale * (float((1 << below) - 1) / -2.0f);
    for (int level = 1; level < job.levels; ++level) {
        u32 word = shared;
        int shift = level == 1 ? 24 : 16;
        if (level > 2) {
            word = fetch(parameters + (4 + (level - 3) / 4) * 16 + row);
            shift = 24 - (level - 3) % 4 * 8;
        }
        const float ratio = float(signed_nibble(word, shift + 4)), moved = float(signed_nibble(word, shift));
        const float parts = float(1 << job.bits[level]);
        scale = scale / parts * (1.0f + ratio / float(8 << below));
        center = fused(scale, parts * (moved / 32.0f - ratio / 16.0f - 0.5f) + 0.5f, center);
        below += job.bits[level];
    }
    weights.scale = scale;
    weights.center = center;
    return weights;
}

// --- blocks of ggml's formats, as interleave() leaves them (weight_layouts.h)

// A block of one row: its words are 16 apart, and so are its parameters.
struct GgmlBlock {
    const GLOBAL u32* words;
    const GLOBAL u8* parameters;
};

// words, parameter_bytes: of a block of one row. chunk: blocks whose words lie together.
FN GgmlBlock ggml_block(ARG_OF(Job) job, i64 blocks, int block, int i, int row, int words, int parameter_bytes,
                        i64 chunk) {
    const i64 inside = i % chunk, first = i - inside;
    const i64 count = blocks - first < chunk ? blocks - first : chunk;
    const i64 begin = (block * blocks + first) * (words * 4 + parameter_bytes) * 16;
    const GLOBAL u8* data = ADDRESS(const u8, job.data) + begin;
    GgmlBlock found;
    found.words = (const GLOBAL u32*)(data + inside * words * 64) + row;
    found.parameters = data + count * words * 64 + inside * parameter_bytes * 16;
    return found;
}

FN u32 word_of(const GgmlBlock block, int i) { return fetch(block.words + i * 16); }

FN u32 parameter_of(const GgmlBlock block, int i, int row) {
    return fetch((const GLOBAL u16*)block.parameters + i * 16 + row);
}

// Of the two blocks of 32 columns in a group one for each half; the last group may have only one.
FN GgmlBlock small_block(ARG_OF(Job) job, int cols, int block, int g, int row, int half, int words, int parameter_bytes,
                         i64 chunk) {
    return ggml_block(job, cols / 32, block, min(2 * g + half, cols / 32 - 1), row, words, parameter_bytes, chunk);
}

FN Weights low_and_high_nibbles(const GgmlBlock block, int first_word) {
    Weights weights;
    UNROLL for (int i = 0; i < 4; ++i) {
        const u32 word = word_of(block, first_word + i);
        weights.codes[i] = word & 0x0F0F0F0Fu;
        weights.codes[4 + i] = word >> 4 & 0x0F0F0F0Fu;
    }
    return weights;
}

FN Weights q4_0_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = small_block(job, cols, block, g, row, half, 4, 2, 2);
    Weights weights = low_and_high_nibbles(found, 0);
    UNROLL for (int i = 0; i < 8; ++i) weights.codes[i] = bytes_minus(weights.codes[i], 8u);
    weights.scale = float_from_half(parameter_of(found, 0, row));
    return weights;
}

FN Weights q4_1_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = small_block(job, cols, block, g, row, half, 4, 4, 1);
    Weights weights = low_and_high_nibbles(found, 0);
    weights.scale = float_from_half(parameter_of(found, 0, row));
    weights.minimum = float_from_half(parameter_of(found, 1, row));
    return weights;
}

FN Weights with_fifth_bits(Weights weights, u32 bits) {
    UNROLL for (int i = 0; i < 8; ++i) weights.codes[i] |= bits_as_bytes(bits >> (4 * i)) << 4;
    return weights;
}

FN Weights q5_0_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = small_block(job, cols, block, g, row, half, 5, 2, 2);
    Weights weights = with_fifth_bits(low_and_high_nibbles(found, 1), word_of(found, 0));
    UNROLL for (int i = 0; i < 8; ++i) weights.codes[i] = bytes_minus(weights.codes[i], 16u);
    weights.scale = float_from_half(parameter_of(found, 0, row));
    return weights;
}

FN Weights q5_1_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = small_block(job, cols, block, g, row, half, 5, 4, 1);
    Weights weights = with_fifth_bits(low_and_high_nibbles(found, 1), word_of(found, 0));
    weights.scale = float_from_half(parameter_of(found, 0, row));
    weights.minimum = float_from_half(parameter_of(found, 1, row));
    return weights;
}

FN Weights q8_0_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = small_block(job, cols, block, g, row, half, 8, 2, cols / 32);
    Weights weights;
    UNROLL for (int i = 0; i < 8; ++i) weights.codes[i] = word_of(found, i);
    weights.scale = float_from_half(parameter_of(found, 0, row));
    return weights;
}

// Numbers of a table of 16 signed bytes, whose words are given, at the four low nibbles of a word.
FN u32 table_bytes(u32 nibbles, u32 a, u32 b, u32 c, u32 d) {
    const u32 below = permute(a, b, nibbles), above = permute(c, d, nibbles);
    return permute(below, above, 0x3210u | (nibbles & 0x8888u) >> 1);
}

FN Weights table_nibbles(const GgmlBlock block, int first_word, u32 a, u32 b, u32 c, u32 d) {
    Weights weights;
    UNROLL for (int i = 0; i < 4; ++i) {
        const u32 word = word_of(block, first_word + i);
        const u32 first = table_bytes(word, a, b, c, d), second = table_bytes(word >> 16, a, b, c, d);
        weights.codes[i] = permute(first, second, 0x6420u);
        weights.codes[4 + i] = permute(first, second, 0x7531u);
    }
    return weights;
}

// -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113
#define IQ4_TABLE 0xBFAD9881u, 0xF6EADDCFu, 0x26190D01u, 0x71594535u
// 0 1 2 3 4 6 8 12 and the same negative: doubled
#define FP4_TABLE 0x03020100u, 0x0C080604u, 0xFDFEFF00u, 0xF4F8FAFCu

FN Weights iq4_nl_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = small_block(job, cols, block, g, row, half, 4, 2, 2);
    Weights weights = table_nibbles(found, 0, IQ4_TABLE);
    weights.scale = float_from_half(parameter_of(found, 0, row));
    return weights;
}

FN Weights mxfp4_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = small_block(job, cols, block, g, row, half, 4, 1, 4);
    Weights weights = table_nibbles(found, 0, FP4_TABLE);
    // 2^(e - 128): half of the format's 2^(e - 127), because the codes are doubled.
    const u32 exponent = fetch(found.parameters + row);
    weights.scale = bits_float(exponent < 2u ? 0x00200000u << exponent : (exponent - 1u) << 23);
    return weights;
}

// Of blocks of 256 columns: group g is quarter g % 4 of block g / 4. Halves are of each half of a group, because two
// columns 32 apart lie in the same byte: part p of half h is columns 32 p + 16 h to 32 p + 16 h + 15.
FN GgmlBlock large_block(ARG_OF(Job) job, int cols, int block, int g, int row, int words, int parameter_bytes,
                         i64 chunk) {
    return ggml_block(job, cols / 256, block, g / 4, row, words, parameter_bytes, chunk);
}

FN Weights q2_k_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = large_block(job, cols, block, g, row, 20, 4, 1);
    const int quarter = g % 4;
    Weights weights;
    UNROLL for (int i = 0; i < 4; ++i) {
        const u32 crumbs = word_of(found, 4 + quarter / 2 * 8 + half * 4 + i) >> (quarter % 2 * 4);
        weights.codes[i] = crumbs & 0x03030303u;
        weights.codes[4 + i] = crumbs >> 2 & 0x03030303u;
    }
    const u32 scales = word_of(found, quarter);
    UNROLL for (int part = 0; part < 2; ++part) {
        const i32 packed = byte_of(scales, 2 * part + half);
        weights.step[part] = packed & 15;
        weights.offset[part] = packed >> 4;
    }
    weights.scale = float_from_half(parameter_of(found, 0, row));
    weights.minimum = float_from_half(parameter_of(found, 1, row));
    return weights;
}

FN Weights q3_k_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = large_block(job, cols, block, g, row, 27, 2, 2);
    const int quarter = g % 4;
    Weights weights;
    UNROLL for (int i = 0; i < 4; ++i) {
        const u32 crumbs = word_of(found, 8 + quarter / 2 * 8 + half * 4 + i) >> (quarter % 2 * 4);
        const u32 bits = word_of(found, half * 4 + i) >> (quarter * 2);
        weights.codes[i] = bytes_minus((crumbs & 0x03030303u) | (bits & 0x01010101u) << 2, 4u);
        weights.codes[4 + i] = bytes_minus((crumbs >> 2 & 0x03030303u) | (bits >> 1 & 0x01010101u) << 2, 4u);
    }
    UNROLL for (int part = 0; part < 2; ++part) {
        const int sub = quarter * 4 + 2 * part + half;
        const i32 low = byte_of(word_of(found, 24 + sub % 8 / 4), sub % 4) >> (sub / 8 * 4) & 15;
        const i32 high = byte_of(word_of(found, 26), sub % 4) >> (sub / 4 * 2) & 3;
        weights.step[part] = (low | high << 4) - 32;
    }
    weights.scale = float_from_half(parameter_of(found, 0, row));
    return weights;
}

// Scales and minimums of q4_k and q5_k, of 32 columns each, in the first three words.
FN Weights with_six_bit_scales(Weights weights, const GgmlBlock block, int quarter) {
    const u32 scales = word_of(block, 0), minimums = word_of(block, 1);
    const u32 last = quarter < 2 ? 0u : word_of(block, 2);
    UNROLL for (int part = 0; part < 2; ++part) {
        const int sub = quarter * 2 + part, place = sub % 4;
        if (quarter < 2) {
            weights.step[part] = byte_of(scales, place) & 63;
            weights.offset[part] = byte_of(minimums, place) & 63;
        } else {
            weights.step[part] = (byte_of(last, place) & 15) | byte_of(scales, place) >> 6 << 4;
            weights.offset[part] = byte_of(last, place) >> 4 | byte_of(minimums, place) >> 6 << 4;
        }
    }
    return weights;
}

FN Weights q4_k_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = large_block(job, cols, block, g, row, 35, 4, 1);
    const int quarter = g % 4;
    Weights weights = with_six_bit_scales(low_and_high_nibbles(found, 3 + quarter * 8 + half * 4), found, quarter);
    weights.scale = float_from_half(parameter_of(found, 0, row));
    weights.minimum = float_from_half(parameter_of(found, 1, row));
    return weights;
}

FN Weights q5_k_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = large_block(job, cols, block, g, row, 43, 4, 1);
    const int quarter = g % 4;
    Weights weights = with_six_bit_scales(low_and_high_nibbles(found, 11 + quarter * 8 + half * 4), found, quarter);
    UNROLL for (int i = 0; i < 4; ++i) {
        const u32 bits = word_of(found, 3 + half * 4 + i) >> (quarter * 2);
        weights.codes[i] |= (bits & 0x01010101u) << 4;
        weights.codes[4 + i] |= (bits >> 1 & 0x01010101u) << 4;
    }
    weights.scale = float_from_half(parameter_of(found, 0, row));
    weights.minimum = float_from_half(parameter_of(found, 1, row));
    return weights;
}

// Where four words of a q6_k block lie, as a digit each: kQ6KPlaces of src/kernels/ggml_formats.h.
FN int q6_k_word(int word) { return int(0x0A842CB976531ull >> (word / 4 * 4) & 15u) * 4 + word % 4; }

FN Weights q6_k_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = large_block(job, cols, block, g, row, 52, 2, 2);
    const int quarter = g % 4;
    Weights weights;
    UNROLL for (int i = 0; i < 4; ++i) {
        const u32 crumbs = word_of(found, q6_k_word(32 + quarter / 2 * 8 + half * 4 + i)) >> (quarter % 2 * 4);
        UNROLL for (int part = 0; part < 2; ++part) {
            const u32 nibbles =
                word_of(found, q6_k_word(quarter / 2 * 16 + part * 8 + half * 4 + i)) >> (quarter % 2 * 4);
            weights.codes[4 * part + i] =
                bytes_minus((nibbles & 0x0F0F0F0Fu) | (crumbs >> (2 * part) & 0x03030303u) << 4, 32u);
        }
    }
    const u32 scales = word_of(found, q6_k_word(48) + quarter);
    UNROLL for (int part = 0; part < 2; ++part) weights.step[part] = i32(i8(scales >> (8 * (2 * part + half)) & 255u));
    weights.scale = float_from_half(parameter_of(found, 0, row));
    return weights;
}

FN Weights iq4_xs_weights(ARG_OF(Job) job, int cols, int block, int g, int row, int half) {
    const GgmlBlock found = large_block(job, cols, block, g, row, 33, 4, 1);
    const int quarter = g % 4;
    // A byte's nibbles are 16 columns apart here, as in blocks of 32: a half is one of them.
    Weights weights = table_nibbles(found, 1 + (quarter * 2 + half) * 4, IQ4_TABLE);
    const int sub = quarter * 2 + half;
    const i32 low = byte_of(word_of(found, 0), sub / 2) >> (sub % 2 * 4) & 15;
    const i32 high = i32(parameter_of(found, 1, row)) >> (sub * 2) & 3;
    weights.step[0] = weights.step[1] = (low | high << 4) - 32;
    weights.scale = float_from_half(parameter_of(found, 0, row));
    return weights;
}

// --- the kernels

// How a lane's two parts lie in a group: side by side in a half of it, or in each half of it.
#define SIDE_BY_SIDE 0
#define APART 1

// What the links of a group are.
#define GROUP_LINKS 0   // scale * x_scale, dot; offset, x_sum
#define SMALL_LINKS 1   // of both halves: scale * x_scale, dot; with minimum: minimum * x_scale, sum of codes
#define LARGE_LINKS 2   // scale * x_scale, steps * dots; with minimum: -(minimum * x_scale), offsets * sums of codes
#define NESTED_LINKS 3  // a sum of three terms, x_scale

// Each has all macros anew: the kernel, its layout's function, how parts lie, its links and how many there are of a
// group, whether the formats have minimums, and whether a code is an unsigned byte.

#define PRODUCT product_q8g64
#define WEIGHTS q8g64_weights
#define PARTS SIDE_BY_SIDE
#define LINKS GROUP_LINKS
#define LINKS_OF_GROUP 2
#define MINIMUM 0
#define UNSIGNED 1
#include "product_of_codes.inl"

#define PRODUCT product_q4g64
#define WEIGHTS q4g64_weights
#define PARTS SIDE_BY_SIDE
#define LINKS GROUP_LINKS
#define LINKS_OF_GROUP 2
#define MINIMUM 0
#define UNSIGNED 1
#include "product_of_codes.inl"

#define PRODUCT product_nested
#define WEIGHTS nested_weights
#define PARTS SIDE_BY_SIDE
#define LINKS NESTED_LINKS
#define LINKS_OF_GROUP 1
#define MINIMUM 0
#define UNSIGNED 1
#include "product_of_codes.inl"

#define PRODUCT product_q4_0
#define WEIGHTS q4_0_weights
#define PARTS SIDE_BY_SIDE
#define LINKS SMALL_LINKS
#define LINKS_OF_GROUP 2
#define MINIMUM 0
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_q5_0
#define WEIGHTS q5_0_weights
#define PARTS SIDE_BY_SIDE
#define LINKS SMALL_LINKS
#define LINKS_OF_GROUP 2
#define MINIMUM 0
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_q8_0
#define WEIGHTS q8_0_weights
#define PARTS SIDE_BY_SIDE
#define LINKS SMALL_LINKS
#define LINKS_OF_GROUP 2
#define MINIMUM 0
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_iq4_nl
#define WEIGHTS iq4_nl_weights
#define PARTS SIDE_BY_SIDE
#define LINKS SMALL_LINKS
#define LINKS_OF_GROUP 2
#define MINIMUM 0
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_mxfp4
#define WEIGHTS mxfp4_weights
#define PARTS SIDE_BY_SIDE
#define LINKS SMALL_LINKS
#define LINKS_OF_GROUP 2
#define MINIMUM 0
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_q4_1
#define WEIGHTS q4_1_weights
#define PARTS SIDE_BY_SIDE
#define LINKS SMALL_LINKS
#define LINKS_OF_GROUP 4
#define MINIMUM 1
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_q5_1
#define WEIGHTS q5_1_weights
#define PARTS SIDE_BY_SIDE
#define LINKS SMALL_LINKS
#define LINKS_OF_GROUP 4
#define MINIMUM 1
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_q2_k
#define WEIGHTS q2_k_weights
#define PARTS APART
#define LINKS LARGE_LINKS
#define LINKS_OF_GROUP 2
#define MINIMUM 1
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_q4_k
#define WEIGHTS q4_k_weights
#define PARTS APART
#define LINKS LARGE_LINKS
#define LINKS_OF_GROUP 2
#define MINIMUM 1
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_q5_k
#define WEIGHTS q5_k_weights
#define PARTS APART
#define LINKS LARGE_LINKS
#define LINKS_OF_GROUP 2
#define MINIMUM 1
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_q3_k
#define WEIGHTS q3_k_weights
#define PARTS APART
#define LINKS LARGE_LINKS
#define LINKS_OF_GROUP 1
#define MINIMUM 0
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_q6_k
#define WEIGHTS q6_k_weights
#define PARTS APART
#define LINKS LARGE_LINKS
#define LINKS_OF_GROUP 1
#define MINIMUM 0
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_iq4_xs
#define WEIGHTS iq4_xs_weights
#define PARTS SIDE_BY_SIDE
#define LINKS LARGE_LINKS
#define LINKS_OF_GROUP 1
#define MINIMUM 0
#define UNSIGNED 0
#include "product_of_codes.inl"

#define PRODUCT product_f32
#define BITS 32
#define FLOAT_OF(word, i) bits_float(word)
#include "product_of_floats.inl"

#define PRODUCT product_bf16
#define BITS 16
#define FLOAT_OF(word, i) float_from_bf16((word) >> (16 * (i)) & 0xFFFFu)
#include "product_of_floats.inl"

#define PRODUCT product_f16
#define BITS 16
#define FLOAT_OF(word, i) float_from_half((word) >> (16 * (i)) & 0xFFFFu)
#include "product_of_floats.inl"
