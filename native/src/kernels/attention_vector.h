// Keys and values in their blocks, and attention over them; attention_scalar.cpp is the reference.
#pragma once

#include "vector_functions.h"

namespace edgemoe {

template <class V>
struct AttentionKernels {
    using F = typename V::F;
    using I = typename V::I;
    using Functions = VectorFunctions<V>;

    // One group of kKvGroup elements as q8_0; returns the float16 scale.
    static uint16_t quantize_kv(const float* x, int8_t* codes) {
        constexpr int chunks = kKvGroup / kLanes;
        I largest = V::set1_i(0);
        EDGEMOE_UNROLL
        for (int c = 0; c < chunks; ++c) largest = V::max_i(largest, V::magnitudes(V::load(x + c * kLanes)));
        const int32_t bits = V::fold_max_i(largest);
        uint16_t half = 0x7E00;
        if (bits < 0x7F800000) {
            half = V::half_of(Functions::as_float(bits) / 127.0f);
            if (half == 0x7C00) half = 0x7E00;
        }
        if (half == 0x7E00 || half == 0) {
            __builtin_memset(codes, 0, kKvGroup);
            return half;
        }
        const F scale = V::set1(V::half_to_float(half));
        EDGEMOE_UNROLL
        for (int c = 0; c < chunks; ++c) {
            const F ratio = V::max(V::set1(-127.0f), V::div(V::load(x + c * kLanes), scale));
            V::store_codes(codes + c * kLanes, Functions::round(V::min(V::set1(127.0f), ratio)));
        }
        return half;
    }

    // Block `number` of a sequence: its keys, with its values behind them.
    static EDGEMOE_INLINE std::byte* kv_block(const KvBlocks& blocks, int number) {
        return blocks.pool + static_cast<size_t>(blocks.table[number]) * blocks.stride;
    }

    static void store_key(KvType type, std::span<const float> key, int position, const KvBlocks& blocks) {
        std::byte* block = kv_block(blocks, position / kKvBlock);
        const int place = position % kKvBlock;
        const float* x = key.data();
        const int dim = static_cast<int>(key.size());
        if (type == KvType::f32) {
            auto* out = reinterpret_cast<float*>(block) + place;
            for (int d = 0; d < dim; ++d) out[d * kKvBlock] = x[d];
        } else if (type == KvType::f16) {
            auto* out = reinterpret_cast<uint16_t*>(block) + place;
            for (int d = 0; d < dim; d += kLanes) {
                uint16_t halves[kLanes];
                const int n = dim - d < kLanes ? dim - d : kLanes;
                V::store_half(halves, n == kLanes ? V::load(x + d) : V::load_n(x + d, n));
                for (int i = 0; i < n; ++i) out[(d + i) * kKvBlock] = halves[i];
            }
        } else {
            auto* out = reinterpret_cast<int8_t*>(block) + place;
            auto* scales = reinterpret_cast<uint16_t*>(block + static_cast<ptrdiff_t>(dim) * kKvBlock) + place;
            for (int d = 0; d < dim; d += kKvGroup) {
                int8_t codes[kKvGroup];
                scales[d / kKvGroup * kKvBlock] = quantize_kv(x + d, codes);
                for (int i = 0; i < kKvGroup; ++i) out[(d + i) * kKvBlock] = codes[i];
            }
        }
    }

    static void store_value(KvType type, std::span<const float> value, int position, const KvBlocks& blocks) {
        std::byte* block = kv_block(blocks, position / kKvBlock) + blocks.values;
        const float* x = value.data();
        const int dim = static_cast<int>(value.size());
        const ptrdiff_t start = static_cast<ptrdiff_t>(position % kKvBlock) * dim;
        if (type == KvType::f32) {
            __builtin_memcpy(reinterpret_cast<float*>(block) + start, x, static_cast<size_t>(dim) * sizeof(float));
        } else if (type == KvType::f16) {
            auto* out = reinterpret_cast<uint16_t*>(block) + start;
            int d = 0;
            for (; d + kLanes <= dim; d += kLanes) V::store_half(out + d, V::load(x + d));
            if (d < dim) {
                uint16_t halves[kLanes];
                V::store_half(halves, V::load_n(x + d, dim - d));
                for (int i = 0; d + i < dim; ++i) out[d + i] = halves[i];
            }
        } else {
            auto* scales = reinterpret_cast<uint16_t*>(block + static_cast<ptrdiff_t>(dim) * kKvBlock);
            for (int d = 0; d < dim; d += kKvGroup)
                scales[(start + d) / kKvGroup] = quantize_kv(x + d, reinterpret_cast<int8_t*>(block) + start + d);
        }
    }

    // Elements index .. index + 15 of a block that lie contiguous, with `n` of them present; q8_0 comes unscaled.
    template <KvType K, bool Whole>
    static EDGEMOE_INLINE F load_kv(const std::byte* block, ptrdiff_t index, int n) {
        if constexpr (K == KvType::f32) {
            const auto* data = reinterpret_cast<const float*>(block) + index;
            return Whole ? V::load(data) : V::load_n(data, n);
        } else if constexpr (K == KvType::f16) {
            const auto* data = reinterpret_cast<const uint16_t*>(block) + index;
            return Whole ? V::load_half(data) : V::load_half_n(data, n);
        } else {
            return V::load_codes(reinterpret_cast<const int8_t*>(block) + index);
        }
    }

    // Scores of H heads for positions begin .. end-1; the other places of `scores` stay.
    template <KvType K, int H>
    static void score(const float* queries, int dim, float scale, const std::byte* keys, int begin, int end,
                      float (*scores)[kKvBlock]) {
        constexpr int chunks = H > 4 ? V::kScoreChunks / 2 : V::kScoreChunks;
        const auto* scales = reinterpret_cast<const uint16_t*>(keys + static_cast<ptrdiff_t>(dim) * kKvBlock);
        for (int place = 0; place < kKvBlock; place += chunks * kLanes) {
            if (place + chunks * kLanes <= begin || place >= end) continue;
            F sums[H][chunks];
            EDGEMOE_UNROLL
            for (int h = 0; h < H; ++h) {
                EDGEMOE_UNROLL
                for (int c = 0; c < chunks; ++c) sums[h][c] = V::zero();
            }
            F factors[chunks] = {};
            for (int d = 0; d < dim; ++d) {
                if constexpr (K == KvType::q8_0) {
                    if (d % kKvGroup == 0) {
                        EDGEMOE_UNROLL
                        for (int c = 0; c < chunks; ++c)
                            factors[c] = V::load_half(scales + d / kKvGroup * kKvBlock + place + c * kLanes);
                    }
                }
                F key[chunks];
                EDGEMOE_UNROLL
                for (int c = 0; c < chunks; ++c) {
                    key[c] = load_kv<K, true>(keys, static_cast<ptrdiff_t>(d) * kKvBlock + place + c * kLanes, kLanes);
                    if constexpr (K == KvType::q8_0) key[c] = V::mul(key[c], factors[c]);
                }
                EDGEMOE_UNROLL
                for (int h = 0; h < H; ++h) {
                    const F query = V::set1(queries[static_cast<ptrdiff_t>(h) * dim + d]);
                    EDGEMOE_UNROLL
                    for (int c = 0; c < chunks; ++c) sums[h][c] = V::fma(query, key[c], sums[h][c]);
                }
            }
            EDGEMOE_UNROLL
            for (int h = 0; h < H; ++h) {
                EDGEMOE_UNROLL
                for (int c = 0; c < chunks; ++c) {
                    const int start = place + c * kLanes;
                    const F product = V::mul(sums[h][c], V::set1(scale));
                    V::store(scores[h] + start,
                             V::keep(product, begin - start, end - start, V::set1(-Functions::kInfinity)));
                }
            }
        }
    }

    // accumulator = accumulator * correction + sum over positions of p * v, for elements d .. d + 16 * N - 1.
    template <KvType K, int H, int N, bool Whole>
    static EDGEMOE_INLINE void add_values(const std::byte* values, int dim, int d, int begin, int end,
                                          const float (*weights)[kKvBlock], const float* corrections,
                                          float* accumulator) {
        const int n = dim - d;
        const auto* scales = reinterpret_cast<const uint16_t*>(values + static_cast<ptrdiff_t>(dim) * kKvBlock);
        F sums[H][N];
        EDGEMOE_UNROLL
        for (int h = 0; h < H; ++h) {
            EDGEMOE_UNROLL
            for (int c = 0; c < N; ++c) {
                const float* old = accumulator + static_cast<ptrdiff_t>(h) * dim + d + c * kLanes;
                sums[h][c] = V::mul(Whole ? V::load(old) : V::load_n(old, n), V::set1(corrections[h]));
            }
        }
        for (int place = begin; place < end; ++place) {
            F value[N];
            EDGEMOE_UNROLL
            for (int c = 0; c < N; ++c) {
                const ptrdiff_t index = static_cast<ptrdiff_t>(place) * dim + d + c * kLanes;
                value[c] = load_kv<K, Whole>(values, index, n);
                if constexpr (K == KvType::q8_0) value[c] = V::mul(value[c], V::set1_half(scales + index / kKvGroup));
            }
            EDGEMOE_UNROLL
            for (int h = 0; h < H; ++h) {
                const F weight = V::set1(weights[h][place]);
                EDGEMOE_UNROLL
                for (int c = 0; c < N; ++c) sums[h][c] = V::fma(weight, value[c], sums[h][c]);
            }
        }
        EDGEMOE_UNROLL
        for (int h = 0; h < H; ++h) {
            EDGEMOE_UNROLL
            for (int c = 0; c < N; ++c) {
                float* place = accumulator + static_cast<ptrdiff_t>(h) * dim + d + c * kLanes;
                if constexpr (Whole)
                    V::store(place, V::canonical(sums[h][c]));
                else
                    V::store_n(place, V::canonical(sums[h][c]), n);
            }
        }
    }

    template <KvType K, int H>
    static void add_all_values(const std::byte* values, int dim, int begin, int end, const float (*weights)[kKvBlock],
                               const float* corrections, float* accumulator) {
        constexpr int N = H > 4 ? V::kValueChunks / 2 : V::kValueChunks;
        int d = 0;
        for (; d + N * kLanes <= dim; d += N * kLanes)
            add_values<K, H, N, true>(values, dim, d, begin, end, weights, corrections, accumulator);
        if constexpr (N > 1) {
            for (; d + kLanes <= dim; d += kLanes)
                add_values<K, H, 1, true>(values, dim, d, begin, end, weights, corrections, accumulator);
        }
        if constexpr (K != KvType::q8_0) {
            if (d < dim) add_values<K, H, 1, false>(values, dim, d, begin, end, weights, corrections, accumulator);
        }
    }

    // The weights of H heads for the positions of a block, and what they do to the state of the online softmax.
    template <int H>
    static EDGEMOE_INLINE void weigh(KvType key_type, const float* queries, int dim, float scale, const std::byte* keys,
                                     int begin, int end, float* maximum, float* sum, float (*weights)[kKvBlock],
                                     float* corrections) {
        constexpr int chunks = kKvBlock / kLanes;
        for (int h = 0; h < H; ++h)
            for (int c = 0; c < chunks; ++c) V::store(weights[h] + c * kLanes, V::set1(-Functions::kInfinity));
        switch (key_type) {
            case KvType::f32:
                score<KvType::f32, H>(queries, dim, scale, keys, begin, end, weights);
                break;
            case KvType::f16:
                score<KvType::f16, H>(queries, dim, scale, keys, begin, end, weights);
                break;
            case KvType::q8_0:
                score<KvType::q8_0, H>(queries, dim, scale, keys, begin, end, weights);
                break;
        }
        for (int h = 0; h < H; ++h) {
            F largest = V::set1(-Functions::kInfinity);
            for (int c = 0; c < chunks; ++c) largest = V::max(largest, V::load(weights[h] + c * kLanes));
            const float block_maximum = V::fold_max(largest);
            const float old_maximum = maximum[h];
            const float new_maximum = old_maximum > block_maximum ? old_maximum : block_maximum;
            corrections[h] = old_maximum == -Functions::kInfinity ? 0.0f : Functions::exp_of(old_maximum - new_maximum);
            F total = V::zero();
            for (int c = 0; c < chunks; ++c) {
                float* place = weights[h] + c * kLanes;
                F weight = Functions::exp_of(V::sub(V::load(place), V::set1(new_maximum)));
                weight = V::keep(weight, begin - c * kLanes, end - c * kLanes, V::zero());
                V::store(place, weight);
                total = V::add(total, weight);
            }
            maximum[h] = new_maximum == new_maximum ? new_maximum : Functions::nan();
            const float new_sum = __builtin_fmaf(sum[h], corrections[h], V::fold_sum(total));
            sum[h] = new_sum == new_sum ? new_sum : Functions::nan();
        }
    }

    template <int H>
    static void attend_heads(KvType key_type, KvType value_type, const float* queries, int dim, float scale,
                             const std::byte* keys, const std::byte* values, int begin, int end, float* maximum,
                             float* sum, float* accumulator) {
        alignas(64) float weights[H][kKvBlock];
        float corrections[H];
        weigh<H>(key_type, queries, dim, scale, keys, begin, end, maximum, sum, weights, corrections);
        switch (value_type) {
            case KvType::f32:
                add_all_values<KvType::f32, H>(values, dim, begin, end, weights, corrections, accumulator);
                break;
            case KvType::f16:
                add_all_values<KvType::f16, H>(values, dim, begin, end, weights, corrections, accumulator);
                break;
            case KvType::q8_0:
                add_all_values<KvType::q8_0, H>(values, dim, begin, end, weights, corrections, accumulator);
                break;
        }
    }

    // Calls step(keys, begin, end) for each block that has positions of [begin, end), with their places in it.
    template <class Step>
    static EDGEMOE_INLINE void each_block(const KvBlocks& blocks, int begin, int end, const Step& step) {
        while (begin < end) {
            const int number = begin / kKvBlock, first = number * kKvBlock;
            step(kv_block(blocks, number), begin - first, end - first < kKvBlock ? end - first : kKvBlock);
            begin = first + kKvBlock;
        }
    }

    static void attend_block(KvType key_type, KvType value_type, const float* queries, int heads, int dim, float scale,
                             const std::byte* keys, const std::byte* values, int begin, int end, float* maximum,
                             float* sum, float* accumulator) {
        // More heads share the conversions of a compressed cache; plain floats have none, and gain from more chunks.
        const bool plain = key_type == KvType::f32 && value_type == KvType::f32;
        while (heads > 0) {
            auto* run = attend_heads<1>;
            int step = 1;
            if (V::kAttendHeads >= 8 && heads >= 8 && !plain) {
                run = attend_heads<V::kAttendHeads>;
                step = 8;
            } else if (heads >= 4) {
                run = attend_heads<4>;
                step = 4;
            } else if (heads >= 2) {
                run = attend_heads<2>;
                step = 2;
            }
            run(key_type, value_type, queries, dim, scale, keys, values, begin, end, maximum, sum, accumulator);
            queries += static_cast<ptrdiff_t>(step) * dim;
            accumulator += static_cast<ptrdiff_t>(step) * dim;
            maximum += step;
            sum += step;
            heads -= step;
        }
    }

    static void attend(KvType key_type, KvType value_type, const float* queries, int heads, int dim, float scale,
                       const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator) {
        each_block(blocks, begin, end, [&](const std::byte* keys, int first, int last) {
            attend_block(key_type, value_type, queries, heads, dim, scale, keys, keys + blocks.values, first, last,
                         maximum, sum, accumulator);
        });
    }

    // Elements d .. d + 15 of the keys of positions begin .. end-1 as rows of values; elements beyond dim are 0.
    template <KvType K>
    static EDGEMOE_INLINE void turn_keys(const std::byte* keys, int dim, int d, int begin, int end,
                                         float (*rows)[kLanes]) {
        const auto* scales = reinterpret_cast<const uint16_t*>(keys + static_cast<ptrdiff_t>(dim) * kKvBlock);
        alignas(64) float element[kLanes][kLanes];  // [element, place]
        const int n = dim - d < kLanes ? dim - d : kLanes;
        for (int first = begin / kLanes * kLanes; first < end; first += kLanes) {
            for (int i = 0; i < n; ++i) {
                F x = load_kv<K, true>(keys, static_cast<ptrdiff_t>(d + i) * kKvBlock + first, kLanes);
                if constexpr (K == KvType::q8_0)
                    x = V::mul(x, V::load_half(scales + (d + i) / kKvGroup * kKvBlock + first));
                V::store(element[i], x);
            }
            for (int i = n; i < kLanes; ++i) V::store(element[i], V::zero());
            for (int place = 0; place < kLanes; ++place) {
                EDGEMOE_UNROLL
                for (int i = 0; i < kLanes; ++i) rows[first + place][i] = element[i][place];
            }
        }
    }

    template <int H>
    static EDGEMOE_INLINE void add_rows(const float (*rows)[kLanes], int begin, int end,
                                        const float (*weights)[kKvBlock], const float* corrections, int n,
                                        ptrdiff_t stride, float* accumulator) {
        F sums[H];
        EDGEMOE_UNROLL
        for (int h = 0; h < H; ++h) sums[h] = V::mul(V::load_n(accumulator + h * stride, n), V::set1(corrections[h]));
        for (int place = begin; place < end; ++place) {
            const F value = V::load(rows[place]);
            EDGEMOE_UNROLL
            for (int h = 0; h < H; ++h) sums[h] = V::fma(V::set1(weights[h][place]), value, sums[h]);
        }
        EDGEMOE_UNROLL
        for (int h = 0; h < H; ++h) V::store_n(accumulator + h * stride, V::canonical(sums[h]), n);
    }

    static void attend_latent_block(KvType type, const float* queries, int heads, int dim, int value_dim, float scale,
                                    const std::byte* keys, int begin, int end, float* maximum, float* sum,
                                    float* accumulator) {
        constexpr int kMany = 16;  // heads that share what is turned
        alignas(64) float weights[kMany][kKvBlock];
        alignas(64) float rows[kKvBlock][kLanes];
        float corrections[kMany];
        for (int first = 0; first < heads; first += kMany) {
            const int count = heads - first < kMany ? heads - first : kMany;
            for (int h = 0; h < count;) {
                const float* query = queries + static_cast<ptrdiff_t>(first + h) * dim;
                float* largest = maximum + first + h;
                float* total = sum + first + h;
                if (count - h >= 4) {
                    weigh<4>(type, query, dim, scale, keys, begin, end, largest, total, weights + h, corrections + h);
                    h += 4;
                } else {
                    weigh<1>(type, query, dim, scale, keys, begin, end, largest, total, weights + h, corrections + h);
                    h += 1;
                }
            }
            for (int d = 0; d < value_dim; d += kLanes) {
                switch (type) {
                    case KvType::f32:
                        turn_keys<KvType::f32>(keys, dim, d, begin, end, rows);
                        break;
                    case KvType::f16:
                        turn_keys<KvType::f16>(keys, dim, d, begin, end, rows);
                        break;
                    case KvType::q8_0:
                        turn_keys<KvType::q8_0>(keys, dim, d, begin, end, rows);
                        break;
                }
                const int n = value_dim - d < kLanes ? value_dim - d : kLanes;
                for (int h = 0; h < count;) {
                    float* place = accumulator + static_cast<ptrdiff_t>(first + h) * value_dim + d;
                    if (count - h >= 4) {
                        add_rows<4>(rows, begin, end, weights + h, corrections + h, n, value_dim, place);
                        h += 4;
                    } else {
                        add_rows<1>(rows, begin, end, weights + h, corrections + h, n, value_dim, place);
                        h += 1;
                    }
                }
            }
        }
    }

    static void attend_latent(KvType type, const float* queries, int heads, int dim, int value_dim, float scale,
                              const KvBlocks& blocks, int begin, int end, float* maximum, float* sum,
                              float* accumulator) {
        each_block(blocks, begin, end, [&](const std::byte* keys, int first, int last) {
            attend_latent_block(type, queries, heads, dim, value_dim, scale, keys, first, last, maximum, sum,
                                accumulator);
        });
    }
};

}  // namespace edgemoe
