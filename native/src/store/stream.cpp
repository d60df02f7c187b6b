#include "store/stream.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace edgemoe {

ExpertStream::ExpertStream(ExpertStore& store, int layer, const Turn& turn, std::span<const Need> needs)
    : store_(store),
      most_awaited_(store.most_awaited(turn)),
      needs_(needs.begin(), needs.end()),
      is_given_(needs.size(), 0) {
    const StoreLayout& layout = store.layout();
    const int count = static_cast<int>(needs.size());
    for (int first = 0, end = 0; first < count; first = end) {
        while (end < count && needs[end].expert == needs[first].expert) ++end;
        Demand& demand = demands_.emplace_back();
        demand.expert = layout.first_expert(layer) + needs[first].expert;
        demand.pieces = layout.piece_of(needs[end - 1].level) + 1;
        progress_.push_back({first, end});
        // Whoever needs a piece needs the coarser ones.
        int32_t uses = 0, last_token = -1, at = end;
        float weight = 0;
        for (int piece = demand.pieces - 1; piece >= 0; --piece) {
            for (; at > first && layout.piece_of(needs[at - 1].level) >= piece; --at) {
                uses += needs[at - 1].uses;
                last_token = std::max(last_token, needs[at - 1].last_token);
                weight += needs[at - 1].weight;
            }
            demand.tokens[piece] = uses;
            demand.last_token[piece] = last_token;
            demand.weights[piece] = weight;
        }
    }
    items_.reserve(needs.size());
    const ExpertStore::Lock lock = store.lock();
    store.begin_turn(lock, layer, turn, demands_);
}

ExpertStream::~ExpertStream() {
    ExpertStore::Lock lock = store_.lock();
    for (Demand& demand : demands_)
        if (demand.kept) store_.let_go(lock, demand);
    if (given_ < needs_.size()) store_.abandon(lock);
}

void ExpertStream::release() {
    for (Progress& progress : progress_) progress.released = progress.given;
    blocked_ = false;
}

std::span<const ExpertStream::Item> ExpertStream::next() {
    if (blocked_) throw std::logic_error("there is no room for more experts before some are released");
    ExpertStore::Lock lock = store_.lock();
    items_.clear();
    for (size_t i = 0; i < demands_.size(); ++i)
        if (demands_[i].kept && progress_[i].released == progress_[i].needs()) store_.let_go(lock, demands_[i]);
    bool anew = false;
    while (given_ < needs_.size()) {
        const Demand* refused = nullptr;
        bool holds = false, awaits = false;
        int awaited = 0;
        for (const Demand& demand : demands_) awaited += demand.kept && store_.present(lock, demand) < demand.pieces;
        bool keeps_all = true;
        for (Demand& demand : demands_) {
            if (demand.kept || progress_[&demand - demands_.data()].given > 0) continue;
            if (awaited < most_awaited_ && !refused && store_.keep(lock, demand)) {
                awaited += store_.present(lock, demand) < demand.pieces;
                continue;
            }
            if (awaited < most_awaited_ && !refused) refused = &demand;
            keeps_all = false;
        }
        const size_t most = keeps_all ? needs_.size() : kSome;
        for (size_t i = 0; i < demands_.size() && items_.size() < most; ++i) {
            const Demand& demand = demands_[i];
            Progress& progress = progress_[i];
            if (progress.given == progress.needs()) {
                holds |= demand.kept;
                continue;
            }
            if (!demand.kept) continue;
            awaits = true;
            const int present = store_.present(lock, demand);
            for (int need = progress.first; need < progress.end; ++need) {
                if (is_given_[need] || store_.layout().piece_of(needs_[need].level) >= present) continue;
                items_.push_back({need, store_.weights(lock, demand.expert, needs_[need].level)});
                is_given_[need] = 1;
                ++progress.given;
                ++given_;
            }
        }
        if (!items_.empty()) break;
        if (awaits || store_.is_reading(lock)) {
            store_.wait(lock);
        } else if (holds) {
            blocked_ = true;
            break;
        } else {
            // Nothing is kept, and yet what this expert has in memory leaves no long run free: it starts anew.
            if (std::exchange(anew, true)) throw std::runtime_error("the memory for experts does not hold one of them");
            store_.evict(lock, refused->expert);
        }
    }
    return items_;
}

}  // namespace edgemoe
