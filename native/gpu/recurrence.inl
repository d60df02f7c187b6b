// Convolutions over positions and the gated delta rule. What they advance lies in the sequences' constants, whose
// addresses each row is given: `states` those that are advanced, `before`, unless it is 0, what lies where they were
// before this row.

// A thread for each channel, which sees the rows in their order.
KERNEL(convolve, IN(0, float, weights), IN(1, float, x), IN(2, u64, states), IN(3, u64, before), IN(4, i32, positions),
       OUT(5, float, out), ARG(6, ConvolveShape, shape)) {
    const i64 channel = i64(GROUP_ID) * convolve_threads + THREAD;
    if (channel >= shape.channels) return;
    const int taps = shape.taps;
    const i64 channels = shape.channels;
    const GLOBAL float* weight = weights + channel / 16 * 16 * taps + channel % 16;  // rows in blocks of 16
    for (int row = 0; row < shape.rows; ++row) {
        GLOBAL float* kept = ADDRESS(float, states[row]) + channel;  // input of position p in row p % taps
        const int position = positions[row];
        if (position == 0) {
            for (int tap = 0; tap < taps; ++tap) kept[tap * channels] = 0.0f;
        } else if (before[row] != 0) {
            const GLOBAL float* from = ADDRESS(float, before[row]) + channel;
            for (int tap = 0; tap < taps; ++tap) kept[tap * channels] = from[tap * channels];
        }
        kept[position % taps * channels] = x[row * channels + channel];
        float sum = 0.0f;
        for (int tap = 0; tap < taps; ++tap) {
            const int earlier = position - (taps - 1) + tap;
            if (earlier >= 0) sum = fused(weight[tap * 16], kept[earlier % taps * channels], sum);
        }
        out[row * channels + channel] = canonical(shape.silu != 0 ? sum / (1.0f + exp_of(0.0f - sum)) : sum);
    }
}

// log(1 + exp(x)), with the polynomial of src/kernels/function_constants.h
FN float softplus_of(float x) {
    const float e = exp_of(0.0f - magnitude_of(x));
    float p = -3.2904686e-3f;
    p = fused(p, e, 2.0086242e-2f);
    p = fused(p, e, -5.745723e-2f);
    p = fused(p, e, 1.0661128e-1f);
    p = fused(p, e, -1.534488e-1f);
    p = fused(p, e, 1.9692102e-1f);
    p = fused(p, e, -2.4958019e-1f);
    p = fused(p, e, 3.3330464e-1f);
    p = fused(p, e, -4.999993e-1f);
    return maximum_of(0.0f, x) + e * fused(p, e, 1.0f);
}

// Where a head's beta lies, and its alpha behind it if `fused_beta_alpha`.
FN i64 beta_of(const DeltaShape shape, i32 row, i32 head) {
    const int together = shape.heads / shape.kv_heads;
    if (shape.fused_beta_alpha == 0) return i64(row) * shape.heads + head;
    return 2 * (i64(row) * shape.heads + head / together * together) + head % together;
}

FN i64 mixed_size(const DeltaShape shape) {
    return 2 * i64(shape.kv_heads) * shape.key_dim + i64(shape.heads) * shape.value_dim;
}

// For each row 2 * kv_heads + 1 groups: the heads of its queries and keys, and all its betas and alphas.
KERNEL(prepare_delta, OUT(0, float, mixed), OUT(1, float, beta), OUT(2, float, alpha), IN(3, float, query_norm),
       IN(4, float, key_norm), IN(5, float, decay_rate), IN(6, float, step_bias), ARG(7, DeltaShape, shape)) {
    SHARED(float, tile, ROW_TILE);
    const int parts = 2 * shape.kv_heads + 1, row = GROUP_ID / parts, part = GROUP_ID % parts, dim = shape.key_dim;
    if (part == parts - 1) {
        for (int h = THREAD; h < shape.heads; h += prepare_delta_threads) {
            const i64 at = beta_of(shape, row, h);
            beta[at] = canonical(sigmoid_of(beta[at]));
            GLOBAL float* decay = alpha + at;
            if (shape.fused_beta_alpha != 0) decay = beta + at + shape.heads / shape.kv_heads;
            decay[0] = canonical(exp_of(decay_rate[h] * softplus_of(decay[0] + step_bias[h])));
        }
        return;
    }
    GLOBAL float* head = mixed + row * mixed_size(shape) + i64(part) * dim;
    const GLOBAL float* norm = part < shape.kv_heads ? query_norm : key_norm;
    // Added to the sum of squares, of which the norm takes the mean.
    const float epsilon = 1e-6f / float(dim);
    const float inverse = inverse_root_mean_square(head, dim, epsilon, tile, prepare_delta_threads);
    for (int i = THREAD; i < dim; i += prepare_delta_threads) head[i] = canonical(head[i] * inverse * norm[i]);
}

// For each head groups of 32 columns of its state, a thread for each, which sees the rows in their order.
KERNEL(gated_delta, IN(0, float, mixed), IN(1, float, beta), IN(2, float, alpha), IN(3, u64, states),
       IN(4, u64, before), IN(5, i32, positions), OUT(6, float, out), ARG(7, DeltaShape, shape)) {
    const int dim = shape.key_dim, columns = shape.value_dim, parts = (columns + 31) / 32;
    const int h = GROUP_ID / parts, column = GROUP_ID % parts * 32 + LANE;
    if (column >= columns) return;
    const int together = shape.heads / shape.kv_heads;
    const int key_head = shape.tiled_heads != 0 ? h % shape.kv_heads : h / together;
    const i64 keys = i64(shape.kv_heads) * dim, place = i64(h) * dim * columns + column;
    for (int row = 0; row < shape.rows; ++row) {
        GLOBAL float* state = ADDRESS(float, states[row]) + place;
        if (positions[row] == 0) {
            for (int k = 0; k < dim; ++k) state[k * columns] = 0.0f;
        } else if (before[row] != 0) {
            const GLOBAL float* from = ADDRESS(float, before[row]) + place;
            for (int k = 0; k < dim; ++k) state[k * columns] = from[k * columns];
        }
        const i64 at = beta_of(shape, row, h);
        const float rate = beta[at], decay = shape.fused_beta_alpha != 0 ? beta[at + together] : alpha[at];
        const GLOBAL float* query = mixed + row * mixed_size(shape) + i64(key_head) * dim;
        const GLOBAL float* key = query + keys;
        const float value = mixed[row * mixed_size(shape) + 2 * keys + i64(h) * columns + column];
        float memory = 0.0f;
        ROUNDS(16)
        for (int k = 0; k < dim; ++k) memory = fused(state[k * columns] * decay, key[k], memory);
        const float delta = (value - memory) * rate;
        float sum = 0.0f;
        ROUNDS(16)
        for (int k = 0; k < dim; ++k) {
            const float element = canonical(fused(key[k], delta, state[k * columns] * decay));
            state[k * columns] = element;
            sum = fused(element, query[k], sum);
        }
        out[(i64(row) * shape.heads + h) * columns + column] = canonical(sum);
    }
}

// A group for each (row, head).
KERNEL(finish_delta, OUT(0, float, out), IN(1, float, gates), IN(2, float, head_norm), ARG(3, DeltaShape, shape)) {
    SHARED(float, tile, ROW_TILE);
    const int size = shape.value_dim;
    const i64 begin = i64(GROUP_ID) * size;
    const float inverse = inverse_root_mean_square(out + begin, size, shape.epsilon, tile, finish_delta_threads);
    for (int i = THREAD; i < size; i += finish_delta_threads) {
        const float gate = gates[begin + i], value = out[begin + i] * inverse * head_norm[i];
        out[begin + i] = canonical(gate / (1.0f + exp_of(0.0f - gate)) * value);
    }
}
