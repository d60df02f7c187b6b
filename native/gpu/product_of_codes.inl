// A product with quantized weights. Included by products.inl once for each layout, with macros that say which.
//
// The warps of a workgroup take groups of 64 columns in turn, or a block of 256 columns, whose words several of its
// groups have in common. They leave the links of the chains in shared memory, where a thread for each row and pair adds
// them up.

KERNEL_OF(PRODUCT, IN(0, float, values), IN(1, i8, codes), IN(2, float, scales), IN(3, float, sums),
          ARG(4, Jobs, jobs)) {
    SHARED(float, slopes, MOST_LINKS);
    SHARED(float, terms, MOST_LINKS);
    int which = 0;
    while (which + 1 < jobs.count && GROUP_ID >= jobs.job[which + 1].begin) ++which;
    ARG_OF(Job) job = jobs.job[which];
    const int row_blocks = (job.rows + 15) / 16;
    const int block = (GROUP_ID - job.begin) % row_blocks;
    const int first_pair = (GROUP_ID - job.begin) / row_blocks * TILE_PAIRS;
    const int pairs = min(TILE_PAIRS, job.count - first_pair);
    const int groups = (jobs.cols + 63) / 64;
    i64 inputs[TILE_PAIRS];  // the first group of each pair's row of input
    UNROLL for (int p = 0; p < TILE_PAIRS; ++p) {
        const int pair = job.first + first_pair + min(p, pairs - 1);
        inputs[p] = i64(job.inputs != 0 ? fetch(ADDRESS(const i32, job.inputs) + pair) : pair) * groups;
    }
    const int row = LANE & 15, half = LANE >> 4;
    const int unit = LINKS == LARGE_LINKS ? 4 : 1;
    const int links = LINKS == SMALL_LINKS ? jobs.cols / 32 * (LINKS_OF_GROUP / 2) : groups * LINKS_OF_GROUP;
    const int tile = MOST_LINKS / (16 * LINKS_OF_GROUP * (pairs == 1 ? 1 : TILE_PAIRS));
    float sum = 0.0f;
    for (int first = 0; first < groups; first += tile) {
        const int end = min(groups, first + tile);
        for (int begin = first + WARP * unit; begin < end; begin += WARPS * unit)
            for (int g = begin; g < min(begin + unit, end); ++g) {
                const Weights weights = WEIGHTS(job, jobs.cols, block, g, row, half);
                UNROLL for (int p = 0; p < TILE_PAIRS; ++p) {
                    if (p >= pairs) break;
                    const GLOBAL u32* x = (const GLOBAL u32*)codes + (inputs[p] + g) * 16;
                    const float x_scale = fetch(scales + inputs[p] + g);
                    i32 dots[2] = {0, 0}, totals[2] = {0, 0};
                    UNROLL for (int part = 0; part < 2; ++part) UNROLL for (int i = 0; i < 4; ++i) {
                        const u32 four = fetch(x + (PARTS == APART ? part * 8 + half * 4 : half * 8 + part * 4) + i);
                        const u32 weight = weights.codes[4 * part + i];
                        dots[part] =
                            UNSIGNED ? dot4_unsigned(weight, four, dots[part]) : dot4(weight, four, dots[part]);
                        if (MINIMUM || LINKS == NESTED_LINKS) totals[part] = dot4(0x01010101u, four, totals[part]);
                    }
                    const int place =
                        ((g - first) * LINKS_OF_GROUP * pairs + p) * 16 + row;  // of the group's first link
                    const int next = pairs * 16;
                    if (LINKS == GROUP_LINKS) {
                        i32 dot = dots[0] + dots[1];
                        dot += shuffle_xor(dot, 16);
                        slopes[place + half * next] = half == 0 ? weights.scale * x_scale : weights.scale;
                        terms[place + half * next] = half == 0 ? float(dot) : fetch(sums + inputs[p] + g);
                    } else if (LINKS == SMALL_LINKS) {
                        const int own = place + half * (LINKS_OF_GROUP / 2) * next;
                        slopes[own] = weights.scale * x_scale;
                        terms[own] = float(dots[0] + dots[1]);
                        if (MINIMUM) {
                            slopes[own + next] = weights.minimum * x_scale;
                            terms[own + next] = float(totals[0] + totals[1]);
                        }
                    } else if (LINKS == LARGE_LINKS) {
                        i32 dot = weights.step[0] * dots[0] + weights.step[1] * dots[1];
                        dot += shuffle_xor(dot, 16);
                        if (half == 0) {
                            slopes[place] = weights.scale * x_scale;
                            terms[place] = float(dot);
                        }
                        if (MINIMUM) {
                            i32 total = weights.offset[0] * totals[0] + weights.offset[1] * totals[1];
                            total += shuffle_xor(total, 16);
                            if (half == 1) {
                                slopes[place + next] = -(weights.minimum * x_scale);
                                terms[place + next] = float(total);
                            }
                        }
                    } else {
                        i32 dot = weights.step[0] * dots[0] + weights.step[1] * dots[1];
                        i32 moved = weights.offset[0] * totals[0] + weights.offset[1] * totals[1];
                        i32 total = weights.step[0] * totals[0] + weights.step[1] * totals[1];
                        dot += shuffle_xor(dot, 16);
                        moved += shuffle_xor(moved, 16);
                        total += shuffle_xor(total, 16);
                        if (half == 0) {
                            float term = weights.scale * float(dot);
                            term = fused(weights.minimum, float(moved), term);
                            slopes[place] = fused(weights.center, float(total), term);
                            terms[place] = x_scale;
                        }
                    }
                }
            }
        BARRIER();
        if (THREAD < pairs * 16) {
            const int count = min(end * LINKS_OF_GROUP, links) - first * LINKS_OF_GROUP;
            for (int i = 0; i < count; ++i) {
                const int place = i * pairs * 16 + THREAD;
                sum = fused(slopes[place], terms[place], sum);
            }
        }
        BARRIER();
    }
    if (THREAD < pairs * 16 && block * 16 + row < job.rows) {
        const i64 pair = job.first + first_pair + THREAD / 16;
        ADDRESS(float, job.out)[pair * job.rows + block * 16 + row] = canonical(sum);
    }
}

#undef PRODUCT
#undef WEIGHTS
#undef PARTS
#undef LINKS
#undef LINKS_OF_GROUP
#undef MINIMUM
#undef UNSIGNED
