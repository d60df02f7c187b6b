// Norms, and what is computed of each element alone.

KERNEL(rms_norm, ALIAS(0, float, x), IN(1, float, weight), OUT(2, float, out), ARG(3, NormShape, shape)) {
    SHARED(float, shared_inverse, 1);
    const i64 first = i64(GROUP_ID) * shape.size;
    if (WARP == 0) {  // lanes 16 to 31 do what lanes 0 to 15 do
        float sum = 0.0f;
        for (int i = LANE & 15; i < shape.size; i += 16) sum = fused(x[first + i], x[first + i], sum);
        sum = fold_sum(sum);
        if (LANE == 0) shared_inverse[0] = 1.0f / sqrt_of(sum / float(shape.size) + shape.epsilon);
    }
    BARRIER();
    const float inverse = shared_inverse[0];
    for (int i = THREAD; i < shape.size; i += rms_norm_threads)
        out[first + i] = canonical(x[first + i] * inverse * weight[i]);
}
