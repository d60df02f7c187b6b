// Norms, sums, activations and what else is done to rows element by element.

#define ROW_TILE 2048

// This thread's element among those of all groups.
#define ELEMENT(kernel) (i64(GROUP_ID) * kernel##_threads + THREAD)

struct Place {
    i32 row, column;
};

FN Place place_of(i64 element, i32 size) {
    Place place;
    if (element <= 0x7FFFFFFF) {  // a division of 64 bits takes several times as long
        place.row = i32(element) / size;
        place.column = i32(element) % size;
    } else {
        place.row = i32(element / size);
        place.column = i32(element % size);
    }
    return place;
}

FN i64 elements_of(i32 size, i32 rows) { return i64(size) * rows; }

// Reductions of a row go over tiles which the whole group loads and the first warp adds up: its lanes 0 to 15 are the
// accumulators, 16 to 31 do the same again.

// 1 / sqrt(mean(x^2) + epsilon), for all threads of the group. Nobody writes to the tile before a barrier.
FN float inverse_root_mean_square(const GLOBAL float* x, i32 size, float epsilon, LOCAL float* tile, i32 threads) {
    float sum = 0.0f;
    for (int first = 0; first < size; first += ROW_TILE) {
        const int count = min(ROW_TILE, size - first);
        for (int i = THREAD; i < count; i += threads) tile[i] = x[first + i];
        BARRIER();
        if (WARP == 0)
            for (int i = LANE & 15; i < count; i += 16) sum = fused(tile[i], tile[i], sum);
        BARRIER();
    }
    if (WARP == 0) {
        sum = fold_sum(sum);
        if (LANE == 0) tile[0] = 1.0f / sqrt_of(sum / float(size) + epsilon);
    }
    BARRIER();
    return tile[0];
}

// A group for each row.
KERNEL(rms_norm, ALIAS(0, float, x), IN(1, float, weight), OUT(2, float, out), ARG(3, NormShape, shape)) {
    SHARED(float, tile, ROW_TILE);
    const GLOBAL float* row = x + i64(GROUP_ID) * shape.size;
    GLOBAL float* target = out + i64(GROUP_ID) * shape.size;
    const float inverse = inverse_root_mean_square(row, shape.size, shape.epsilon, tile, rms_norm_threads);
    for (int i = THREAD; i < shape.size; i += rms_norm_threads) target[i] = canonical(row[i] * inverse * weight[i]);
}

// A group for each row.
KERNEL(layer_norm, ALIAS(0, float, x), IN(1, float, weight), IN(2, float, bias), OUT(3, float, out),
       ARG(4, NormShape, shape)) {
    SHARED(float, tile, ROW_TILE);
    SHARED(float, result, 1);
    const GLOBAL float* row = x + i64(GROUP_ID) * shape.size;
    GLOBAL float* target = out + i64(GROUP_ID) * shape.size;
    float sum = 0.0f;
    for (int first = 0; first < shape.size; first += ROW_TILE) {
        const int count = min(ROW_TILE, shape.size - first);
        for (int i = THREAD; i < count; i += layer_norm_threads) tile[i] = row[first + i];
        BARRIER();
        if (WARP == 0)
            for (int i = LANE & 15; i < count; i += 16) sum += tile[i];
        BARRIER();
    }
    if (WARP == 0) {
        sum = fold_sum(sum);
        if (LANE == 0) result[0] = sum / float(shape.size);
    }
    BARRIER();
    const float mean = result[0];
    float squares = 0.0f;
    for (int first = 0; first < shape.size; first += ROW_TILE) {
        const int count = min(ROW_TILE, shape.size - first);
        for (int i = THREAD; i < count; i += layer_norm_threads) tile[i] = row[first + i] - mean;
        BARRIER();
        if (WARP == 0)
            for (int i = LANE & 15; i < count; i += 16) squares = fused(tile[i], tile[i], squares);
        BARRIER();
    }
    if (WARP == 0) {
        squares = fold_sum(squares);
        if (LANE == 0) result[0] = 1.0f / sqrt_of(squares / float(shape.size) + shape.epsilon);
    }
    BARRIER();
    const float inverse = result[0];
    for (int i = THREAD; i < shape.size; i += layer_norm_threads)
        target[i] = canonical(fused((row[i] - mean) * inverse, weight[i], bias[i]));
}

KERNEL(add_vector, IN(0, float, vector), OUT(1, float, x), ARG(2, VectorShape, shape)) {
    const i64 i = ELEMENT(add_vector);
    if (i >= elements_of(shape.size, shape.count)) return;
    x[i] = canonical(x[i] + vector[place_of(i, shape.size).column]);
}

KERNEL(add_scaled, IN(0, float, values), OUT(1, float, x), ARG(2, VectorShape, shape)) {
    const i64 i = ELEMENT(add_scaled);
    if (i < elements_of(shape.size, shape.count)) x[i] = canonical(fused(shape.factor, values[i], x[i]));
}

KERNEL(scale_by, IN(0, float, factor), OUT(1, float, x), ARG(2, VectorShape, shape)) {
    const i64 i = ELEMENT(scale_by);
    if (i < elements_of(shape.size, shape.count)) x[i] = canonical(x[i] * factor[0]);
}

KERNEL(gather_rows, IN(0, float, x), IN(1, i32, rows), OUT(2, float, out), ARG(3, VectorShape, shape)) {
    const i64 i = ELEMENT(gather_rows);
    if (i >= elements_of(shape.size, shape.count)) return;
    const Place place = place_of(i, shape.size);
    out[i] = x[i64(rows[place.row]) * shape.size + place.column];
}

KERNEL(copy_heads, IN(0, float, x), OUT(1, float, out), ARG(2, CopyShape, shape)) {
    const i64 i = ELEMENT(copy_heads);
    if (i >= elements_of(shape.size, shape.count) * shape.heads) return;
    const Place in_row = place_of(i, shape.size);
    const i64 head = in_row.row / shape.count, row = in_row.row % shape.count;
    out[head * shape.to_step + row * shape.to_stride + in_row.column] =
        x[head * shape.from_step + row * shape.from_stride + in_row.column];
}

KERNEL(multiply, ALIAS(0, float, a), ALIAS(1, float, b), OUT(2, float, out), ARG(3, MultiplyShape, shape)) {
    const i64 i = ELEMENT(multiply);
    if (i >= elements_of(shape.size, shape.count)) return;
    const Place place = place_of(i, shape.size);
    const i64 row = place.row, column = place.column;
    out[row * shape.out_stride + column] =
        canonical(a[row * shape.a_stride + column] * b[row * shape.b_stride + column]);
}

FN float activation_of(const ActivateShape shape, float gate, float up) {
    if (shape.kind == 0) return gate / (1.0f + exp_of(0.0f - gate)) * up;
    if (shape.kind == 1) {
        const float inner = fused(0.044715f * gate, gate * gate, gate) * 1.59576912160573071f;  // 2 sqrt(2 / pi)
        return gate / (1.0f + exp_of(0.0f - inner)) * up;
    }
    const float g = minimum_of(shape.limit, gate), u = maximum_of(-shape.limit, minimum_of(shape.limit, up));
    return g / (1.0f + exp_of(0.0f - g * shape.alpha)) * (u + 1.0f);
}

KERNEL(activate, OUT(0, float, gate), IN(1, float, up), IN(2, float, gate_bias), IN(3, float, up_bias),
       IN(4, i32, experts), ARG(5, ActivateShape, shape)) {
    const i64 i = ELEMENT(activate);
    if (i >= elements_of(shape.size, shape.count)) return;
    float g = gate[i], u = up[i];
    if (gate_bias != nullptr || up_bias != nullptr) {
        const Place place = place_of(i, shape.size);
        i64 at = place.column;
        if (experts != nullptr) at += i64(experts[shape.first + place.row]) * shape.size;
        if (gate_bias != nullptr) g = g + gate_bias[at];
        if (up_bias != nullptr) u = u + up_bias[at];
    }
    gate[i] = canonical(activation_of(shape, g, u));
}

// A group for each row.
KERNEL(gate_rows, IN(0, float, weights), IN(1, float, x), OUT(2, float, out), ARG(3, VectorShape, shape)) {
    SHARED(float, tile, ROW_TILE);
    SHARED(float, factors, ROW_TILE);
    SHARED(float, result, 1);
    const i64 begin = i64(GROUP_ID) * shape.size;
    float sum = 0.0f;
    for (int first = 0; first < shape.size; first += ROW_TILE) {
        const int count = min(ROW_TILE, shape.size - first);
        for (int i = THREAD; i < count; i += gate_rows_threads) {
            tile[i] = x[begin + first + i];
            factors[i] = weights[first + i];
        }
        BARRIER();
        if (WARP == 0)
            for (int i = LANE & 15; i < count; i += 16) sum = fused(tile[i], factors[i], sum);
        BARRIER();
    }
    if (WARP == 0) {
        sum = fold_sum(sum);
        if (LANE == 0) result[0] = sigmoid_of(sum);
    }
    BARRIER();
    const float gate = result[0];
    for (int i = THREAD; i < shape.size; i += gate_rows_threads) {
        const i64 at = begin + i;
        out[at] = canonical(out[at] * gate);
    }
}

KERNEL(combine, IN(0, float, always), IN(1, float, weights), IN(2, i32, picks), IN(3, i32, places),
       IN(4, float, outputs), IN(5, float, down_bias), OUT(6, float, sum), ARG(7, CombineShape, shape),
       ARG(8, i32, rows)) {
    const i64 i = ELEMENT(combine);
    if (i >= elements_of(shape.size, rows)) return;
    const Place place = place_of(i, shape.size);
    const i64 size = shape.size, column = place.column;
    float total = 0.0f;
    if (shape.from_zero == 0) total = sum[i];
    if (always != nullptr) total = fused(shape.scale, always[i], total);
    for (int pick = 0; pick < shape.top_k; ++pick) {
        const i64 pair = i64(place.row) * shape.top_k + pick;
        const float weight = shape.scale * weights[pair];
        total = fused(weight, outputs[places[pair] * size + column], total);
        if (down_bias != nullptr) total = fused(weight, down_bias[picks[pair] * size + column], total);
    }
    sum[i] = canonical(total);
}

KERNEL(finish_logits, OUT(0, float, logits), IN(1, float, bias), ARG(2, LogitsShape, shape), ARG(3, i32, rows)) {
    const i64 i = ELEMENT(finish_logits);
    if (i >= elements_of(shape.size, rows)) return;
    float logit = logits[i];
    if (bias != nullptr) logit = logit + bias[place_of(i, shape.size).column];
    if (shape.divisor != 1.0f) logit = logit / shape.divisor;
    if (shape.softcap != 0.0f) {
        const float t = logit / shape.softcap;
        logit = (1.0f - 2.0f / (1.0f + exp_of(t + t))) * shape.softcap;
    }
    logits[i] = canonical(logit);
}
