// EDGEMOE_KERNEL(name, threads of a group) for every kernel, with its arguments and groups. Floats are rows [rows,
// size] one after the other unless it says otherwise. A buffer that may be missing is then 0.
//
// What each computes is what the CPU computes with the scalar kernels (edgemoe/kernels.h) in src/backend/cpu, to the
// bit.

// --- products.inl

// (in float x, out i8 codes, out float scales, out float sums, QuantizeShape, i32 rows): a group for each 4 pairs of
// (row, 64 columns): Kernels::quantize of all rows
EDGEMOE_KERNEL(quantize_rows, 128)

// (in float values, in i8 codes, in float scales, in float sums, Jobs): Kernels::matmul. Float layouts read values, the
// others the rest. Groups: those of all jobs, each row blocks * tiles of TILE_PAIRS pairs, row blocks fastest.
EDGEMOE_KERNEL(product_f32, 128)
EDGEMOE_KERNEL(product_bf16, 128)
EDGEMOE_KERNEL(product_f16, 128)
EDGEMOE_KERNEL(product_q8g64, 128)
EDGEMOE_KERNEL(product_q4g64, 128)
EDGEMOE_KERNEL(product_q4_0, 128)
EDGEMOE_KERNEL(product_q4_1, 128)
EDGEMOE_KERNEL(product_q5_0, 128)
EDGEMOE_KERNEL(product_q5_1, 128)
EDGEMOE_KERNEL(product_q8_0, 128)
EDGEMOE_KERNEL(product_q2_k, 128)
EDGEMOE_KERNEL(product_q3_k, 128)
EDGEMOE_KERNEL(product_q4_k, 128)
EDGEMOE_KERNEL(product_q5_k, 128)
EDGEMOE_KERNEL(product_q6_k, 128)
EDGEMOE_KERNEL(product_iq4_nl, 128)
EDGEMOE_KERNEL(product_iq4_xs, 128)
EDGEMOE_KERNEL(product_mxfp4, 128)
EDGEMOE_KERNEL(product_nested, 128)

// --- elementwise.inl

// (in float x, in float weight, out float out, NormShape): a group for each row; out may be x
EDGEMOE_KERNEL(rms_norm, 256)
// (in float x, in float weight, in float bias, out float out, NormShape): a group for each row; out may be x
EDGEMOE_KERNEL(layer_norm, 256)
// (in float vector, inout float x, VectorShape): x[row] += vector; a thread for each element
EDGEMOE_KERNEL(add_vector, 256)
// (in float values, inout float x, VectorShape): x = fma(factor, values, x); a thread for each element
EDGEMOE_KERNEL(add_scaled, 256)
// (in float factor, inout float x, VectorShape): x *= factor[0]; a thread for each element
EDGEMOE_KERNEL(scale_by, 256)
// (in float x, in i32 rows, out float out, VectorShape): out[i] = x[rows[i]]; a thread for each element of out, which
// is not x
EDGEMOE_KERNEL(gather_rows, 256)
// (in float x, out float out, CopyShape): what lies apart for each head of each row, brought together for products of
// the heads' own (Backend::products_by_head), and back. A thread for each of size * heads * count elements.
EDGEMOE_KERNEL(copy_heads, 256)
// (in float a, in float b, inout float out, MultiplyShape): a thread for each element; out may be a or b
EDGEMOE_KERNEL(multiply, 256)
// (inout float gate, in float up, in float gate_bias, in float up_bias, in i32 experts, ActivateShape): gate =
// activation(gate + bias, up + bias). Biases may be missing. Without `experts` they are one row, otherwise those of
// experts[first + row]. A thread for each element.
EDGEMOE_KERNEL(activate, 256)
// (in float weights, in float x, inout float out, VectorShape): Backend::gate_rows; a group for each row
EDGEMOE_KERNEL(gate_rows, 256)
// (in float shared, in float weights, in i32 picks, in i32 places, in float outputs, in float down_bias, inout float
// sum, CombineShape, i32 rows): Backend::combine. shared and down_bias may be missing. A thread for each element.
EDGEMOE_KERNEL(combine, 256)
// (inout float logits, in float bias, LogitsShape, i32 rows): what Backend::head does after the product, bias may be
// missing; a divisor of 1 and a softcap of 0 do nothing. A thread for each element.
EDGEMOE_KERNEL(finish_logits, 256)

// --- attention.inl

// (in float projected, out float queries, HeadsShape, i32 rows): [rows, heads, query | gate] -> [rows, heads, dim]; a
// thread for each element of queries
EDGEMOE_KERNEL(split_gates, 256)
// (inout float x, VectorShape): limits to +-factor as CpuBackend::store does; a thread for each element
EDGEMOE_KERNEL(clip, 256)
// (inout float x, in float norm, in float cosine, in float sine, HeadsShape): RMSNorm of each head if there is a norm,
// then its rotation by row r's cosine[r * pairs ...], if pairs; of interleaved pairs at most 1024. A group for each
// (row, head).
EDGEMOE_KERNEL(turn_heads, 128)
// (in float keys, in i32 positions, in i32 sequences, in i32 tables, StateShape): Kernels::store_key of [rows,
// kv_heads, dim]. Row r is position positions[r] of the sequence whose table is tables[sequences[r] * blocks ...]. A
// group for each (row, kv head).
EDGEMOE_KERNEL(store_keys, 128)
// The same with values.
EDGEMOE_KERNEL(store_values, 128)
// (in float queries, in float projected, in float sinks, in i32 positions, in i32 sequences, in i32 tables, out float
// attended, StateShape): CpuBackend::attend, with gates if `gated`; sinks and projected may be missing. A group for
// each (row, head).
EDGEMOE_KERNEL(attend, 128)

// (inout float queries, inout float latents, in float norm, in float cosine, in float sine, in i32 positions, in i32
// sequences, in i32 tables, LatentShape): CpuBackend::store_latents; `first` and `count` do not matter. Groups: 1 +
// heads for each row.
EDGEMOE_KERNEL(store_latents, 128)
// (in float queries, inout float asked, in i32 positions, in i32 sequences, in i32 tables, out float found,
// LatentShape): CpuBackend::attend_latents. A group for each (row, head of `count`).
EDGEMOE_KERNEL(attend_latents, 128)

// --- recurrence.inl

// In these `states` are each row's address of what its sequence has in this layer (SequenceState::convolution() or
// recurrence()), `before` that of what must be copied there first, or 0: convolution_before() or recurrence_before()
// where the row's position is the sequence's length.

// (in float weights, in float x, in u64 states, in u64 before, in i32 positions, out float out, ConvolveShape):
// CpuBackend::convolve. weights as a matrix of the f32 layout. A thread for each channel.
EDGEMOE_KERNEL(convolve, 128)
// (inout float mixed, inout float beta, inout float alpha, in float query_norm, in float key_norm, in float decay_rate,
// in float step_bias, DeltaShape): what CpuBackend::gated_delta does first. alpha may be missing if fused_beta_alpha.
// Groups: 2 * kv_heads + 1 for each row.
EDGEMOE_KERNEL(prepare_delta, 128)
// (in float mixed, in float beta, in float alpha, in u64 states, in u64 before, in i32 positions, out float out,
// DeltaShape): Kernels::gated_delta of all rows and heads. Groups: heads * (value_dim / 32, rounded up).
EDGEMOE_KERNEL(gated_delta, 32)
// (inout float out, in float gates, in float head_norm, DeltaShape): the norm and gates after it. A group for each
// (row, head).
EDGEMOE_KERNEL(finish_delta, 128)

// --- routing.inl

// (inout float scores, in float selection_bias, in float expert_scale, out i32 picks, out float weights, out float
// choice, out i32 order, ChooseShape): CpuBackend::choose. selection_bias, expert_scale and weights may be missing;
// choice and order are [rows, experts] of room. A group for each row.
EDGEMOE_KERNEL(choose, 32)
