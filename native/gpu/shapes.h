// What kernels are told beside the addresses of their buffers: the same structs for the host and for every device.
// Addresses in them are the device's, as numbers; 0 is none.
#pragma once

#ifndef EDGEMOE_DEVICE_TEXT  // dialect.h has the types otherwise
#include <cstdint>
namespace edgemoe::gpu {
using u8 = uint8_t;
using i32 = int32_t;
using u64 = unsigned long long;
#endif

// One matrix [rows, cols] times some rows of input. Pair i of `count` reads input row `first + i`, or where there are
// `inputs`, inputs[first + i], and is written to out + (first + i) * rows.
struct Job {
    u64 data;      // weights as on the CPU (weight_layouts.h); of nested ones level 0
    u64 later[7];  // nested: levels 1, 2, ... of those that work
    u64 inputs;    // const i32*
    u64 out;       // float*
    i32 rows, first, count;
    i32 begin;       // this job's first workgroup of the launch: it has row blocks * tiles of TILE_PAIRS pairs
    i32 levels;      // nested: how many work
    i32 parameters;  // nested: levels after level 0 that it has parameters of
    u8 bits[8];      // nested: that each level adds
};

#define TILE_PAIRS 4
#define MOST_JOBS 16

// The jobs of one launch: matrices of one layout and one width, for inputs [.., cols] and [.., groups of 64 columns].
struct Jobs {
    i32 count, cols;
    Job job[MOST_JOBS];
};

struct QuantizeShape {
    i32 cols, stride;  // rows of x are `stride` apart; codes, scales and sums of a row follow those of the one before
};

struct NormShape {
    i32 size;  // of a row
    float epsilon;
};

struct VectorShape {
    i32 size, count;  // of a row; rows
    float factor;
};

// out[row] = a[row] * b[row], rows so many elements apart
struct MultiplyShape {
    i32 size, count;
    i32 a_stride, b_stride, out_stride;
};

// out[h * to_step + row * to_stride + i] = x[h * from_step + row * from_stride + i]
struct CopyShape {
    i32 size, heads, count;
    i32 from_step, from_stride, to_step, to_stride;
};

struct ActivateShape {
    i32 size, count;
    i32 kind;   // 0 silu, 1 gelu_tanh, 2 clamped_swiglu: as Activation
    i32 first;  // row 0 is this one of `experts`
    float alpha, limit;
};

struct CombineShape {
    i32 size, top_k;
    i32 from_zero;
    float scale;
};

struct LogitsShape {
    i32 size;
    float divisor, softcap;
};

// Heads of rows: [rows, heads, dim]
struct HeadsShape {
    i32 heads, dim;
    i32 pairs;        // that are turned, 0 for none
    i32 interleaved;  // element 2 i and 2 i + 1 are a pair, not i and i + pairs
    float epsilon;    // of the norm of each head
};

struct StateShape {
    i32 heads, kv_heads, dim;
    i32 key_type, value_type;  // 0 f32, 1 f16, 2 q8_0: as KvType
    i32 window;
    i32 gated;                 // attend: queries' gates stand behind them in `projected`
    i32 blocks;                // entries of a sequence's table
    u64 pool, stride, values;  // as KvBlocks, of kv head 0
    u64 head;                  // bytes from one kv head to the next in a block
    float scale;
};

// Latents [rows, rank + rope_dim], stored as the keys of the one head that `state` has, of that many elements; `heads`
// of it are those of queries.
struct LatentShape {
    StateShape state;
    i32 rank, rope_dim;
    i32 head_dim;     // of queries, whose last rope_dim elements are turned
    i32 first;        // attend_latents: the first of the heads dealt with
    i32 count;        // of them
    i32 pairs;        // that are turned
    i32 interleaved;  // as in HeadsShape
    float epsilon;    // of the latents' norm
};

struct ConvolveShape {
    i32 channels, taps, rows;
    i32 silu;
};

// As DeltaHeads.
struct DeltaShape {
    i32 heads, kv_heads, key_dim, value_dim;
    i32 tiled_heads, fused_beta_alpha;
    i32 rows;
    float epsilon;  // of the heads' norm
};

struct ChooseShape {
    i32 experts, top_k;
    i32 scores;  // as RouterScores
    i32 groups, groups_kept, group_score;
    i32 renormalize;
    float renormalize_least, renormalize_epsilon, weight_scale, mask_threshold;
};

#ifndef EDGEMOE_DEVICE_TEXT
}  // namespace edgemoe::gpu
#endif
