// Queries, keys and values, their place in the state, and attention over what came before.

#define KV_BLOCK 64  // positions of a block
#define KV_GROUP 32  // elements of a q8_0 key or value that share a scale

// --- before attention ---

KERNEL(split_gates, IN(0, float, projected), OUT(1, float, queries), ARG(2, HeadsShape, shape), ARG(3, i32, rows)) {
    const i64 i = ELEMENT(split_gates);
    if (i >= elements_of(shape.dim, rows) * shape.heads) return;
    queries[i] = projected[i + i / shape.dim * shape.dim];
}

KERNEL(clip, OUT(0, float, x), ARG(1, VectorShape, shape)) {
    const i64 i = ELEMENT(clip);
    if (i >= elements_of(shape.size, shape.count)) return;
    const float value = x[i];
    x[i] = value > shape.factor ? shape.factor : value < -shape.factor ? -shape.factor : value;
}

// CpuBackend::rotate of one head, by the group. tile: ROW_TILE elements.
FN void turn_pairs(GLOBAL float* head, const GLOBAL float* cosine, const GLOBAL float* sine, i32 pairs, i32 interleaved,
                   LOCAL float* tile, i32 threads) {
    if (interleaved != 0) {
        for (int i = THREAD; i < 2 * pairs; i += threads) tile[i] = head[i];
        BARRIER();
    }
    for (int i = THREAD; i < pairs; i += threads) {
        const float first = interleaved != 0 ? tile[2 * i] : head[i];
        const float second = interleaved != 0 ? tile[2 * i + 1] : head[i + pairs];
        head[i] = canonical(fused(first, cosine[i], -(second * sine[i])));
        head[i + pairs] = canonical(fused(second, cosine[i], first * sine[i]));
    }
}

// A group for each (row, head).
KERNEL(turn_heads, OUT(0, float, x), IN(1, float, norm), IN(2, float, cosine), IN(3, float, sine),
       ARG(4, HeadsShape, shape)) {
    SHARED(float, tile, ROW_TILE);
    GLOBAL float* head = x + i64(GROUP_ID) * shape.dim;
    if (norm != nullptr) {
        const float inverse = inverse_root_mean_square(head, shape.dim, shape.epsilon, tile, turn_heads_threads);
        for (int i = THREAD; i < shape.dim; i += turn_heads_threads) head[i] = canonical(head[i] * inverse * norm[i]);
        BARRIER();
    }
    const i64 angles = i64(GROUP_ID / shape.heads) * shape.pairs;
    turn_pairs(head, cosine + angles, sine + angles, shape.pairs, shape.interleaved, tile, turn_heads_threads);
}

// --- keys and values ---

// Element d of a vector goes to place d * stride + start of a block, the scale of group g to g * scale_stride +
// scale_start behind the codes.
FN void store_vector(i32 type, const GLOBAL float* x, i32 dim, i32 stride, i32 start, i32 scale_stride, i32 scale_start,
                     GLOBAL u8* block, int thread, int threads) {
    if (type == 0) {
        GLOBAL float* to = (GLOBAL float*)block;
        for (int d = thread; d < dim; d += threads) to[d * stride + start] = x[d];
        return;
    }
    if (type == 1) {
        GLOBAL u16* to = (GLOBAL u16*)block;
        for (int d = thread; d < dim; d += threads) to[d * stride + start] = u16(half_from_float(x[d]));
        return;
    }
    GLOBAL i8* codes = (GLOBAL i8*)block;
    GLOBAL u16* scales = (GLOBAL u16*)(block + dim * KV_BLOCK);
    for (int d = thread; d < dim; d += threads) {  // a warp has a group, whose elements are whole warps
        const float value = x[d];
        i32 magnitude = i32(float_bits(magnitude_of(value)));
        for (int width = 16; width >= 1; width /= 2) magnitude = max(magnitude, shuffle_xor(magnitude, width));
        u32 half_scale = 0x7E00u;
        if (magnitude < 0x7F800000) half_scale = half_from_float(bits_float(u32(magnitude)) / 127.0f);
        if (half_scale == 0x7C00u) half_scale = 0x7E00u;
        int code = 0;
        if (half_scale != 0u && half_scale != 0x7E00u)
            code = nearest(minimum_of(127.0f, maximum_of(-127.0f, value / float_from_half(half_scale))));
        codes[d * stride + start] = i8(code);
        if (d % KV_GROUP == 0) scales[d / KV_GROUP * scale_stride + scale_start] = u16(half_scale);
    }
}

// The block of the pool that has a position of a row's sequence, with the keys of a kv head first.
FN GLOBAL u8* block_of(const StateShape shape, const GLOBAL i32* table, i32 number, i32 kv_head) {
    return ADDRESS(u8, shape.pool + u64(table[number]) * shape.stride + u64(kv_head) * shape.head);
}

// A group for each (row, kv head).
KERNEL(store_keys, IN(0, float, keys), IN(1, i32, positions), IN(2, i32, sequences), IN(3, i32, tables),
       ARG(4, StateShape, shape)) {
    const int row = GROUP_ID / shape.kv_heads, position = positions[row], place = position % KV_BLOCK;
    const GLOBAL i32* table = tables + i64(sequences[row]) * shape.blocks;
    store_vector(shape.key_type, keys + i64(GROUP_ID) * shape.dim, shape.dim, KV_BLOCK, place, KV_BLOCK, place,
                 block_of(shape, table, position / KV_BLOCK, GROUP_ID % shape.kv_heads), THREAD, store_keys_threads);
}

// A group for each (row, kv head).
KERNEL(store_values, IN(0, float, values), IN(1, i32, positions), IN(2, i32, sequences), IN(3, i32, tables),
       ARG(4, StateShape, shape)) {
    const int row = GROUP_ID / shape.kv_heads, position = positions[row], place = position % KV_BLOCK;
    const GLOBAL i32* table = tables + i64(sequences[row]) * shape.blocks;
    store_vector(shape.value_type, values + i64(GROUP_ID) * shape.dim, shape.dim, 1, place * shape.dim, 1,
                 place * (shape.dim / KV_GROUP),
                 block_of(shape, table, position / KV_BLOCK, GROUP_ID % shape.kv_heads) + shape.values, THREAD,
                 store_values_threads);
}

// --- attention ---

// query . key of the position at `place` of a block.
FN float score_of(i32 type, const GLOBAL float* query, const GLOBAL u8* keys, i32 dim, i32 place) {
    float score = 0.0f;
    if (type == 2) {
        const GLOBAL i8* codes = (const GLOBAL i8*)keys;
        const GLOBAL u16* scales = (const GLOBAL u16*)(keys + dim * KV_BLOCK);
        for (int group = 0; group < dim / KV_GROUP; ++group) {
            const float scale = float_from_half(scales[group * KV_BLOCK + place]);
            ROUNDS(32)
            for (int i = 0; i < KV_GROUP; ++i) {
                const int d = group * KV_GROUP + i;
                score = fused(query[d], float(codes[d * KV_BLOCK + place]) * scale, score);
            }
        }
    } else if (type == 1) {
        const GLOBAL u16* halves = (const GLOBAL u16*)keys;
        ROUNDS(32)
        for (int d = 0; d < dim; ++d) score = fused(query[d], float_from_half(halves[d * KV_BLOCK + place]), score);
    } else {
        const GLOBAL float* floats = (const GLOBAL float*)keys;
        ROUNDS(32)
        for (int d = 0; d < dim; ++d) score = fused(query[d], floats[d * KV_BLOCK + place], score);
    }
    return score;
}

// Adds element d of the values at places [begin, end) of a block, times their probabilities.
FN float add_values(i32 type, const LOCAL float* probabilities, const GLOBAL u8* values, i32 dim, i32 d, i32 begin,
                    i32 end, float sum) {
    if (type == 2) {
        const GLOBAL i8* codes = (const GLOBAL i8*)values;
        const GLOBAL u16* scales = (const GLOBAL u16*)(values + dim * KV_BLOCK);
        const int groups = dim / KV_GROUP, group = d / KV_GROUP;
        ROUNDS(16)
        for (int place = begin; place < end; ++place)
            sum = fused(probabilities[place],
                        float(codes[place * dim + d]) * float_from_half(scales[place * groups + group]), sum);
    } else if (type == 1) {
        const GLOBAL u16* halves = (const GLOBAL u16*)values;
        ROUNDS(16)
        for (int place = begin; place < end; ++place)
            sum = fused(probabilities[place], float_from_half(halves[place * dim + d]), sum);
    } else {
        const GLOBAL float* floats = (const GLOBAL float*)values;
        ROUNDS(16)
        for (int place = begin; place < end; ++place) sum = fused(probabilities[place], floats[place * dim + d], sum);
    }
    return sum;
}

// Blocks are dealt with in tiles, so that there is something to do for all of a group's 128 threads: their scores
// first, all at once, a thread for a place; then each block's maximum and the probabilities after it, half a warp for a
// block; then values, a thread for an element. What one block hands on to the next are a few numbers, which each thread
// works out for itself.
#define TILE_BLOCKS 8
#define ATTEND_THREADS 128

// The blocks of a tile and the positions [begin, end) that are seen, of all.
struct Tile {
    i32 first, count, begin, end;
};

FN void score_tile(const StateShape shape, const GLOBAL i32* table, i32 kv_head, const GLOBAL float* query,
                   const Tile tile, LOCAL float* scores) {
    for (int i = THREAD; i < tile.count * KV_BLOCK; i += ATTEND_THREADS) {
        const int position = tile.first * KV_BLOCK + i;
        float score = -infinity();
        if (position >= tile.begin && position < tile.end) {
            const GLOBAL u8* keys = block_of(shape, table, tile.first + i / KV_BLOCK, kv_head);
            score = score_of(shape.key_type, query, keys, shape.dim, i % KV_BLOCK) * shape.scale;
        }
        scores[i] = score;
    }
    BARRIER();
}

// Over all blocks so far.
struct Softmax {
    float maximum, sum;
};

// Scores become probabilities. corrections: of what is summed up before each block.
FN Softmax softmax_tile(Softmax so_far, const Tile tile, LOCAL float* scores, LOCAL float* maxima,
                        LOCAL float* corrections, LOCAL float* totals) {
    const int own = THREAD / 16, lane = THREAD % 16;
    float largest = -infinity();
    if (own < tile.count)
        for (int i = lane; i < KV_BLOCK; i += 16) largest = maximum_of(largest, scores[own * KV_BLOCK + i]);
    largest = fold_max(largest);
    if (lane == 0) maxima[own] = largest;
    BARRIER();
    float before = so_far.maximum;  // the maximum before this thread's block, and after it
    for (int block = 0; block < own && block < tile.count; ++block) before = maximum_of(before, maxima[block]);
    const float after = maximum_of(before, maxima[own]);
    float total = 0.0f;
    if (own < tile.count)
        for (int i = lane; i < KV_BLOCK; i += 16) {
            const int at = own * KV_BLOCK + i, position = tile.first * KV_BLOCK + at;
            const float probability = position >= tile.begin && position < tile.end ? exp_of(scores[at] - after) : 0.0f;
            scores[at] = probability;
            total += probability;
        }
    total = fold_sum(total);
    if (lane == 0) {
        corrections[own] = before == -infinity() ? 0.0f : exp_of(before - after);
        totals[own] = total;
    }
    BARRIER();
    for (int block = 0; block < tile.count; ++block) {
        so_far.maximum = maximum_of(so_far.maximum, maxima[block]);
        so_far.sum = fused(so_far.sum, corrections[block], totals[block]);
    }
    return so_far;
}

// A group for each (row, head).
KERNEL(attend, IN(0, float, queries), IN(1, float, projected), IN(2, float, sinks), IN(3, i32, positions),
       IN(4, i32, sequences), IN(5, i32, tables), OUT(6, float, attended), ARG(7, StateShape, shape)) {
    SHARED(float, scores, TILE_BLOCKS* KV_BLOCK);
    SHARED(float, maxima, TILE_BLOCKS);
    SHARED(float, corrections, TILE_BLOCKS);
    SHARED(float, totals, TILE_BLOCKS);
    const int row = GROUP_ID / shape.heads, head = GROUP_ID % shape.heads, dim = shape.dim;
    const int kv_head = head / (shape.heads / shape.kv_heads);
    GLOBAL float* out = attended + i64(GROUP_ID) * dim;
    const GLOBAL i32* table = tables + i64(sequences[row]) * shape.blocks;
    const int end = positions[row] + 1, begin = shape.window != 0 ? max(end - shape.window, 0) : 0;
    const int blocks = (end + KV_BLOCK - 1) / KV_BLOCK;
    Softmax softmax = {-infinity(), 0.0f};
    if (sinks != nullptr) {  // a score before all others, whose value is zero
        softmax.maximum = sinks[head];
        softmax.sum = 1.0f;
    }
    for (int d = THREAD; d < dim; d += ATTEND_THREADS) out[d] = 0.0f;
    for (int first = begin / KV_BLOCK; first < blocks; first += TILE_BLOCKS) {
        const Tile tile = {first, min(TILE_BLOCKS, blocks - first), begin, end};
        score_tile(shape, table, kv_head, queries + i64(GROUP_ID) * dim, tile, scores);
        softmax = softmax_tile(softmax, tile, scores, maxima, corrections, totals);
        for (int d = THREAD; d < dim; d += ATTEND_THREADS) {
            float element = out[d];
            for (int block = 0; block < tile.count; ++block) {
                const int start = (first + block) * KV_BLOCK;
                element = add_values(shape.value_type, scores + block * KV_BLOCK,
                                     block_of(shape, table, first + block, kv_head) + shape.values, dim, d,
                                     max(begin - start, 0), min(end - start, KV_BLOCK), element * corrections[block]);
            }
            out[d] = element;
        }
        BARRIER();
    }
    for (int d = THREAD; d < dim; d += ATTEND_THREADS) {
        float element = out[d] / softmax.sum;
        if (shape.gated != 0) element = element * sigmoid_of(projected[i64(GROUP_ID) * 2 * dim + dim + d]);
        out[d] = canonical(element);
    }
}

// --- latents, of which all heads have the same ---

// 1 + heads groups for each row: its latent, and the heads of its query.
KERNEL(store_latents, OUT(0, float, queries), OUT(1, float, latents), IN(2, float, norm), IN(3, float, cosine),
       IN(4, float, sine), IN(5, i32, positions), IN(6, i32, sequences), IN(7, i32, tables),
       ARG(8, LatentShape, shape)) {
    SHARED(float, tile, ROW_TILE);
    const int parts = 1 + shape.state.heads, row = GROUP_ID / parts, part = GROUP_ID % parts;
    const i64 angles = i64(row) * shape.pairs;
    if (part > 0) {
        GLOBAL float* head = queries + (i64(row) * shape.state.heads + part) * shape.head_dim - shape.rope_dim;
        turn_pairs(head, cosine + angles, sine + angles, shape.pairs, shape.interleaved, tile, store_latents_threads);
        return;
    }
    const int rank = shape.rank, position = positions[row], place = position % KV_BLOCK;
    GLOBAL float* latent = latents + i64(row) * shape.state.dim;
    const float inverse = inverse_root_mean_square(latent, rank, shape.epsilon, tile, store_latents_threads);
    for (int i = THREAD; i < rank; i += store_latents_threads) latent[i] = canonical(latent[i] * inverse * norm[i]);
    BARRIER();
    turn_pairs(latent + rank, cosine + angles, sine + angles, shape.pairs, shape.interleaved, tile,
               store_latents_threads);
    BARRIER();
    store_vector(shape.state.key_type, latent, shape.state.dim, KV_BLOCK, place, KV_BLOCK, place,
                 block_of(shape.state, tables + i64(sequences[row]) * shape.state.blocks, position / KV_BLOCK, 0),
                 THREAD, store_latents_threads);
}

// Latents lie as keys do, transposed. A piece of a block is taken to shared memory by threads that read side by side,
// and from there each thread takes an element of all its places.
#define PIECE_PLACES 32
#define PIECE_STRIDE 33  // so that threads side by side use memory banks side by side

FN float key_element(i32 type, const GLOBAL u8* keys, i32 dim, i32 d, i32 place) {
    const int at = d * KV_BLOCK + place;
    if (type == 0) return ((const GLOBAL float*)keys)[at];
    if (type == 1) return float_from_half(((const GLOBAL u16*)keys)[at]);
    const GLOBAL u16* scales = (const GLOBAL u16*)(keys + dim * KV_BLOCK);
    return float(((const GLOBAL i8*)keys)[at]) * float_from_half(scales[d / KV_GROUP * KV_BLOCK + place]);
}

// A group for each (row, head of those dealt with).
KERNEL(attend_latents, IN(0, float, queries), OUT(1, float, asked), IN(2, i32, positions), IN(3, i32, sequences),
       IN(4, i32, tables), OUT(5, float, found), ARG(6, LatentShape, shape)) {
    SHARED(float, scores, TILE_BLOCKS* KV_BLOCK);
    SHARED(float, maxima, TILE_BLOCKS);
    SHARED(float, corrections, TILE_BLOCKS);
    SHARED(float, totals, TILE_BLOCKS);
    SHARED(float, piece, ATTEND_THREADS* PIECE_STRIDE);
    const StateShape state = shape.state;
    const int row = GROUP_ID / shape.count, head = shape.first + GROUP_ID % shape.count, rank = shape.rank;
    const GLOBAL i32* table = tables + i64(sequences[row]) * state.blocks;
    GLOBAL float* query = asked + i64(GROUP_ID) * state.dim;
    GLOBAL float* out = found + i64(GROUP_ID) * rank;
    const GLOBAL float* turned = queries + (i64(row) * state.heads + head + 1) * shape.head_dim - shape.rope_dim;
    for (int i = THREAD; i < shape.rope_dim; i += ATTEND_THREADS) query[rank + i] = turned[i];
    for (int d = THREAD; d < rank; d += ATTEND_THREADS) out[d] = 0.0f;
    BARRIER();
    const int end = positions[row] + 1, blocks = (end + KV_BLOCK - 1) / KV_BLOCK;
    Softmax softmax = {-infinity(), 0.0f};
    for (int first = 0; first < blocks; first += TILE_BLOCKS) {
        const Tile tile = {first, min(TILE_BLOCKS, blocks - first), 0, end};
        score_tile(state, table, 0, query, tile, scores);
        softmax = softmax_tile(softmax, tile, scores, maxima, corrections, totals);
        for (int begin = 0; begin < rank; begin += ATTEND_THREADS) {
            const int d = begin + THREAD, elements = min(ATTEND_THREADS, rank - begin);
            float element = 0.0f;
            if (d < rank) element = out[d];
            for (int block = 0; block < tile.count; ++block) {
                const GLOBAL u8* keys = block_of(state, table, first + block, 0);
                const int places = min(KV_BLOCK, end - (first + block) * KV_BLOCK);
                element = element * corrections[block];
                for (int from = 0; from < places; from += PIECE_PLACES) {
                    const int some = min(PIECE_PLACES, places - from);
                    ROUNDS(8)
                    for (int i = WARP; i < elements; i += ATTEND_THREADS / 32)
                        if (LANE < some)
                            piece[i * PIECE_STRIDE + LANE] =
                                key_element(state.key_type, keys, state.dim, begin + i, from + LANE);
                    BARRIER();
                    if (d < rank)
                        for (int place = 0; place < some; ++place)
                            element = fused(scores[block * KV_BLOCK + from + place],
                                            piece[THREAD * PIECE_STRIDE + place], element);
                    BARRIER();
                }
            }
            if (d < rank) out[d] = element;
        }
    }
    for (int d = THREAD; d < rank; d += ATTEND_THREADS) out[d] = canonical(out[d] / softmax.sum);
}
