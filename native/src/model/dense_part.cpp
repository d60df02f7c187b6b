#include "model/dense_part.h"

namespace edgemoe {

GatedActivation activation_of(const LayerSpec& spec) { return {spec.activation, spec.swiglu_alpha, spec.swiglu_limit}; }

DensePart::DensePart(const ModelSpec& model, const LayerSpec& spec, const PlacedWeights& weights,
                     const std::string& name, int dim) {
    const int hidden = model.hidden_size;
    part_.gate = weights.matrix(name + "gate", dim, hidden);
    part_.up = weights.matrix(name + "up", dim, hidden);
    part_.down = weights.matrix(name + "down", hidden, dim);
    if (spec.ffn_bias) {
        part_.gate_bias = weights.vector(name + "gate_bias", dim);
        part_.up_bias = weights.vector(name + "up_bias", dim);
        part_.down_bias = weights.vector(name + "down_bias", hidden);
    }
    part_.activation = activation_of(spec);
}

}  // namespace edgemoe
