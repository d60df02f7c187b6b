// A product with weights that are floats of 16 or 32 bits. Included by products.inl once for each layout, with macros
// that say which.
//
// All threads bring weights and activations to shared memory; a thread for each row and pair has the chain over all
// columns. While it computes, the next weights are on their way.

KERNEL_OF(PRODUCT, IN(0, float, values), IN(1, i8, codes), IN(2, float, scales), IN(3, float, sums),
          ARG(4, Jobs, jobs)) {
    SHARED(float, weights, 64 * 16);         // [column][row]
    SHARED(float, inputs, TILE_PAIRS * 64);  // [pair][column]
    int which = 0;
    while (which + 1 < jobs.count && GROUP_ID >= jobs.job[which + 1].begin) ++which;
    ARG_OF(Job) job = jobs.job[which];
    const int row_blocks = (job.rows + 15) / 16;
    const int block = (GROUP_ID - job.begin) % row_blocks;
    const int first_pair = (GROUP_ID - job.begin) / row_blocks * TILE_PAIRS;
    const int pairs = min(TILE_PAIRS, job.count - first_pair);
    const int cols = jobs.cols;
    // Words, of 32 / BITS rows each.
    const int words_of_column = BITS / 2, rows_of_word = 32 / BITS;
    const int words_of_thread = 64 * (BITS / 2) / (WARPS * 32);
    const GLOBAL u32* data = ADDRESS(const u32, job.data) + i64(block) * cols * words_of_column;
    const i64 words = i64(cols) * words_of_column;
    u32 next[words_of_thread];
    UNROLL for (int i = 0; i < words_of_thread; ++i) {
        const i64 word = i * (WARPS * 32) + THREAD;
        next[i] = word < words ? fetch(data + word) : 0u;
    }
    float sum = 0.0f;
    for (int first = 0; first < cols; first += 64) {
        const int columns = min(64, cols - first);
        UNROLL for (int i = 0; i < words_of_thread; ++i) for (int r = 0; r < rows_of_word; ++r)
            weights[(i * (WARPS * 32) + THREAD) * rows_of_word + r] = FLOAT_OF(next[i], r);
        for (int i = THREAD; i < pairs * 64; i += WARPS * 32) {
            const int pair = job.first + first_pair + i / 64;
            const i64 input = job.inputs != 0 ? fetch(ADDRESS(const i32, job.inputs) + pair) : pair;
            if (i % 64 < columns) inputs[i] = fetch(values + input * cols + first + i % 64);
        }
        BARRIER();
        UNROLL for (int i = 0; i < words_of_thread; ++i) {
            const i64 word = i64(first + 64) * words_of_column + i * (WARPS * 32) + THREAD;
            next[i] = word < words ? fetch(data + word) : 0u;
        }
        if (THREAD < pairs * 16)
            for (int column = 0; column < columns; ++column)
                sum = fused(weights[column * 16 + THREAD % 16], inputs[THREAD / 16 * 64 + column], sum);
        BARRIER();
    }
    if (THREAD < pairs * 16 && block * 16 + THREAD % 16 < job.rows) {
        const i64 pair = job.first + first_pair + THREAD / 16;
        ADDRESS(float, job.out)[pair * job.rows + block * 16 + THREAD % 16] = canonical(sum);
    }
}

#undef PRODUCT
#undef BITS
#undef FLOAT_OF
