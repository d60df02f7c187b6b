#include "model/router.h"

namespace edgemoe {

void Router::Buffers::place(Places& places, const ModelSpec& model, const LayerSpec& spec, int rows) {
    places.place(input, spec.router.input_norm ? size_t(rows) * model.hidden_size : 0);
    places.place(scores, size_t(rows) * spec.experts);
}

Router::Router(const ModelSpec& model, const LayerSpec& spec, const PlacedWeights& weights) {
    const RouterSpec& router = spec.router;
    matrix_ = weights.matrix("router", spec.experts, model.hidden_size);
    if (router.bias) bias_ = weights.vector("router_bias", spec.experts);
    choice_ = {&router, spec.experts, spec.top_k, {}, {}};
    if (router.selection_bias) choice_.selection_bias = weights.vector("selection_bias", spec.experts);
    if (router.expert_scale) choice_.expert_scale = weights.vector("expert_scale", spec.experts);
    if (router.input_norm)
        norm_ = {weights.vector("router_norm", model.hidden_size, [&](float x) { return x * router.input_scale; }),
                 {},
                 model.hidden_size,
                 model.norm_epsilon};
}

void Router::route(Backend& backend, const Buffers& buffers, ConstFloats x, ConstFloats normed, int count,
                   Buffer<int32_t> picks, Floats weights) const {
    if (norm_) backend.normalize(norm_, x, count, buffers.input);
    backend.product({&matrix_, 1}, norm_ ? ConstFloats(buffers.input) : normed, count, {&buffers.scores, 1});
    if (bias_) backend.add_vector(bias_, buffers.scores, matrix_.rows, count);
    backend.choose(choice_, buffers.scores, count, picks, weights);
}

}  // namespace edgemoe
