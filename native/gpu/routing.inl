// The choice of experts from the router's scores.

// Kernels::softmax by one warp, in place: lanes 0 to 15 are the accumulators. All lanes see the result after it.
FN void softmax_of(GLOBAL float* x, i32 size) {
    const int padded = (size + 15) / 16 * 16;
    float largest = -infinity();
    if (LANE < 16)
        for (int i = LANE; i < padded; i += 16) largest = maximum_of(largest, i < size ? x[i] : -infinity());
    largest = fold_max(largest);
    float total = 0.0f;
    if (LANE < 16)
        for (int i = LANE; i < size; i += 16) {
            const float distance = x[i] - largest;
            const float share = exp_of(distance < -64.0f ? -104.0f : distance);
            x[i] = share;
            total += share;
        }
    total = fold_sum(total);
    if (LANE < 16)
        for (int i = LANE; i < size; i += 16) x[i] = canonical(x[i] / total);
    BARRIER();
}

// A score that is not a number sorts last.
FN float sort_key(float score) { return score == score ? score : -infinity(); }

// Whether the first comes before the second: larger ones first, of equal ones the one with the smaller number.
FN bool precedes(float key, i32 number, float other_key, i32 other) {
    return key > other_key || (key == other_key && number < other);
}

// The numbers of the `count` largest of `size` scores in their order, by one warp.
FN void find_largest(const GLOBAL float* scores, i32 size, i32 count, GLOBAL i32* order) {
    float last = infinity();  // what was found last: before the first, nothing that would come after all
    i32 last_number = -1;
    for (int found = 0; found < count; ++found) {
        float best = -infinity();
        i32 number = size;
        for (int i = LANE; i < size; i += 32) {
            const float key = sort_key(scores[i]);
            if (precedes(last, last_number, key, i) && precedes(key, i, best, number)) {
                best = key;
                number = i;
            }
        }
        for (int width = 16; width >= 1; width /= 2) {
            const float other = shuffle_xor(best, width);
            const i32 other_number = shuffle_xor(number, width);
            if (precedes(other, other_number, best, number)) {
                best = other;
                number = other_number;
            }
        }
        if (LANE == 0) order[found] = number;
        last = best;
        last_number = number;
    }
}

// Leaves only the best groups of experts in the choice, of which each lane writes what it reads in find_largest().
// `order` takes the groups' scores meanwhile.
FN void keep_best_groups(const ChooseShape shape, GLOBAL float* choice, GLOBAL i32* order) {
    const int size = shape.experts / shape.groups;
    for (int group = LANE; group < shape.groups; group += 32) {
        float first = -infinity(), second = -infinity();
        for (int i = 0; i < size; ++i) {
            const float key = sort_key(choice[group * size + i]);
            if (key > first) {
                second = first;
                first = key;
            } else if (second < key) {
                second = key;
            }
        }
        order[group] = i32(float_bits(sort_key(shape.group_score == 0 ? first : first + second)));
    }
    BARRIER();
    for (int expert = LANE; expert < shape.experts; expert += 32) {
        const int group = expert / size;
        const float key = bits_float(u32(order[group]));
        int before = 0;  // groups that are better than this one
        for (int other = 0; other < shape.groups; ++other)
            if (precedes(bits_float(u32(order[other])), other, key, group)) ++before;
        if (before >= shape.groups_kept) choice[expert] = -infinity();
    }
}

// A group, of one warp, for each row.
KERNEL(choose, OUT(0, float, all_scores), IN(1, float, selection_bias), IN(2, float, expert_scale), OUT(3, i32, picks),
       OUT(4, float, weights), OUT(5, float, all_choice), OUT(6, i32, all_order), ARG(7, ChooseShape, shape)) {
    const int experts = shape.experts, top_k = shape.top_k;
    GLOBAL float* scores = all_scores + i64(GROUP_ID) * experts;
    GLOBAL float* choice = all_choice + i64(GROUP_ID) * experts;
    GLOBAL i32* order = all_order + i64(GROUP_ID) * experts;
    GLOBAL i32* picked = picks + i64(GROUP_ID) * top_k;
    GLOBAL float* out = weights;
    if (weights != nullptr) out = weights + i64(GROUP_ID) * top_k;
    if (shape.scores == 3) {
        // SparseMixer: each choice's weight is its share among the experts whose logits come near it, and the next is
        // made among the others.
        find_largest(scores, experts, top_k, picked);
        BARRIER();
        for (int pick = 0; weights != nullptr && pick < top_k; ++pick) {
            const float best = scores[picked[pick]];
            for (int expert = LANE; expert < experts; expert += 32) {
                const float score = scores[expert], magnitude = magnitude_of(score);
                const float distance = (best - score) / (magnitude < best ? best : magnitude);
                float left = distance > shape.mask_threshold ? -infinity() : score;
                for (int earlier = 0; earlier < pick; ++earlier)
                    if (picked[earlier] == expert) left = -infinity();
                choice[expert] = left;
            }
            BARRIER();
            softmax_of(choice, experts);
            if (LANE == 0) out[pick] = choice[picked[pick]];
            BARRIER();
        }
    } else {
        if (shape.scores == 0) softmax_of(scores, experts);
        for (int expert = LANE; expert < experts; expert += 32) {
            float score = scores[expert];
            if (shape.scores == 2) {
                score = canonical(sigmoid_of(score));
                scores[expert] = score;
            }
            if (selection_bias != nullptr) score = canonical(score + selection_bias[expert]);
            choice[expert] = score;
        }
        BARRIER();
        if (shape.groups > 1) keep_best_groups(shape, choice, order);
        find_largest(choice, experts, top_k, picked);
        BARRIER();
        if (weights != nullptr) {
            for (int pick = LANE; pick < top_k; pick += 32) out[pick] = scores[picked[pick]];
            BARRIER();
            if (shape.scores == 1) softmax_of(out, top_k);
        }
    }
    if (weights == nullptr) return;
    float total = 0.0f;
    if (shape.renormalize != 0) {
        for (int pick = 0; pick < top_k; ++pick) total += out[pick];
        if (total < shape.renormalize_least) total = shape.renormalize_least;
        total += shape.renormalize_epsilon;
    }
    BARRIER();
    for (int pick = LANE; pick < top_k; pick += 32) {
        float weight = out[pick];
        if (shape.renormalize != 0) weight = weight / total;
        weight = weight * shape.weight_scale;
        if (expert_scale != nullptr) weight = weight * expert_scale[picked[pick]];
        out[pick] = canonical(weight);
    }
}
