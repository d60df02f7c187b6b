#include "edgemoe/recorders.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace edgemoe {

RoutingRecorder::RoutingRecorder(const ModelSpec& spec) : columns_{0} {
    for (const LayerSpec& layer : spec.layers) columns_.push_back(columns_.back() + layer.top_k);
    record_ = empty();
}

RoutingRecord RoutingRecorder::empty() const { return {columns_.back(), {}, {}, {}}; }

void RoutingRecorder::begin(int rows) {
    const size_t size = rows * columns_.back();
    chunk_.picks.assign(size, 0);
    chunk_.weights.assign(size, 0);
    chunk_.predicted.assign(size, RoutingRecord::kNoPrediction);
}

void RoutingRecorder::finish() {
    const auto append = [](auto& all, const auto& chunk) { all.insert(all.end(), chunk.begin(), chunk.end()); };
    append(record_.picks, chunk_.picks);
    append(record_.weights, chunk_.weights);
    append(record_.predicted, chunk_.predicted);
}

template <class From, class To>
void RoutingRecorder::put(int layer, std::span<const From> values, std::vector<To>& rows) const {
    const size_t width = columns_[layer + 1] - columns_[layer];
    for (size_t i = 0; i < values.size(); ++i)
        rows[i / width * columns_.back() + columns_[layer] + i % width] = static_cast<To>(values[i]);
}

void RoutingRecorder::routed(int layer, std::span<const int32_t> picks, std::span<const float> weights) {
    put(layer, picks, chunk_.picks);
    put(layer, weights, chunk_.weights);
}

void RoutingRecorder::predicted(int layer, std::span<const int32_t> picks) { put(layer, picks, chunk_.predicted); }

RoutingRecord RoutingRecorder::take() { return std::exchange(record_, empty()); }

void LayerRecorder::experts(int /*layer*/, const ExpertsSeen& seen) {
    const size_t pairs = seen.picks.size(), rows = pairs / seen.top_k, size = seen.inputs.size() / rows,
                 ffn = seen.hidden.size() / pairs;
    next_.inputs = std::ranges::copy(seen.inputs, next_.inputs).out;
    next_.picks = std::ranges::copy(seen.picks, next_.picks).out;
    next_.weights = std::ranges::copy(seen.weights, next_.weights).out;
    for (const int32_t place : seen.places) {
        next_.hidden = std::copy_n(seen.hidden.data() + place * ffn, ffn, next_.hidden);
        float peak = 0, energy = 0;
        for (const float output : seen.outputs.subspan(place * size, size)) {
            peak = std::max(peak, std::abs(output));
            energy += output * output;
        }
        *next_.peaks++ = peak;
        *next_.energies++ = energy;
    }
}

void LayerRecorder::residual(int /*layer*/, std::span<const float> stream) {
    next_.residual = std::ranges::copy(stream, next_.residual).out;
}

}  // namespace edgemoe
