#include "edgemoe/expert_store.h"

#include <algorithm>
#include <bit>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "store/placement.h"

namespace edgemoe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

using Matrices = std::array<StoredTensor, 3>;

Matrices stored_matrices(const ExpertLevel& level) {
    return {stored_tensor(level.parts[0]), stored_tensor(level.parts[1]), stored_tensor(level.parts[2])};
}

uint64_t whole_blocks(uint64_t bytes) { return (bytes + kDiskBlock - 1) / kDiskBlock * kDiskBlock; }

// Whether the levels of a layer's experts go together: one of any layout, or nested ones, coarse to fine.
void require_nested(const ExpertLayer& experts, const std::string& name) {
    const size_t levels = experts.levels.size();
    if (levels < 1 || levels > kMaxLevels) throw std::invalid_argument(name + " has no or too many levels");
    for (int part = 0; part < 3; ++part) {
        int bits = 0;
        for (size_t level = 0; level < levels; ++level) {
            const StoredLayout& stored = experts.levels[level].parts[part].stored;
            bits += stored.level_bits;
            if ((levels > 1 && stored.layout != Layout::nested) || stored.refines != (level > 0) || bits > 8 ||
                (level == 0 && stored.later != static_cast<int>(levels) - 1))
                throw std::invalid_argument(name + " has levels that are not nested");
        }
    }
}

// Units of a length that divide memory for pieces of various lengths, and what all pieces take in them.
struct Division {
    uint64_t unit, bytes;
};

uint64_t run_of(uint64_t bytes, uint64_t unit) {
    return std::bit_ceil(std::max<uint64_t>((bytes + unit - 1) / unit, 1));
}

// The lengths of pieces and their halves, quarters, ...: that which wastes least, and of similar ones the largest, with
// which there is least to keep account of. counts: of pieces that take so many bytes.
Division least_waste(const std::map<uint64_t, uint64_t>& counts) {
    constexpr int kHalvings = 4;
    constexpr size_t kCandidates = 16;
    std::vector<uint64_t> candidates;
    for (auto at = counts.rbegin(); at != counts.rend() && candidates.size() < kCandidates * kHalvings; ++at)
        for (int halvings = 0; halvings < kHalvings; ++halvings)
            candidates.push_back(whole_blocks((at->first + (1 << halvings) - 1) >> halvings));
    std::ranges::sort(candidates, std::greater());
    Division best{0, 0};
    for (const uint64_t unit : candidates) {
        uint64_t total = 0;
        for (const auto& [bytes, count] : counts) total += run_of(bytes, unit) * unit * count;
        if (best.unit == 0 || static_cast<double>(total) < 0.99 * static_cast<double>(best.bytes)) best = {unit, total};
    }
    return best;
}

}  // namespace

StoreLayout::StoreLayout(const PackIndex& index, bool may_join) {
    std::vector<std::vector<uint64_t>> experts;  // bytes of their levels
    std::map<uint64_t, uint64_t> levels, sums;   // how many levels, or whole experts, take so many bytes
    bool several = false;
    for (const auto& [number, layer] : index.experts) {
        const std::string name = "an expert of layer " + std::to_string(number);
        require_nested(layer, name);
        for (const std::vector<uint32_t>& sections : layer.sections) {
            if (sections.empty() || sections.size() > layer.levels.size())
                throw std::invalid_argument(name + " has no levels, or more than its layer");
            std::vector<uint64_t>& sizes = experts.emplace_back();
            for (size_t level = 0; level < sections.size(); ++level) {
                const Matrices matrices = stored_matrices(layer.levels[level]);
                const Placement placement(index.sections.at(sections[level]), matrices);
                placement.require_possible(name);
                for (size_t i = 0; i < matrices.size(); ++i) placement.require_fitting(i, name);
                sizes.push_back(placement.bytes());
            }
            for (const uint64_t bytes : sizes) ++levels[bytes];
            ++sums[std::accumulate(sizes.begin(), sizes.end(), uint64_t{0})];
            several |= layer.levels.size() > 1;
        }
    }
    if (experts.empty()) return;
    if (several) {
        const Division apart = least_waste(levels), together = least_waste(sums);
        joined = may_join && together.bytes <= apart.bytes;
        unit = joined ? together.unit : apart.unit;
    } else {
        unit = levels.rbegin()->first;
    }
    for (const std::vector<uint64_t>& sizes : experts) {
        int taken = 0;
        for (const uint64_t bytes : sizes) taken += run(bytes);
        if (joined) taken = run(std::accumulate(sizes.begin(), sizes.end(), uint64_t{0}));
        units_per_slot = std::max(units_per_slot, taken);
        units += static_cast<uint64_t>(taken);
    }
}

int StoreLayout::run(uint64_t bytes) const { return static_cast<int>(run_of(bytes, unit)); }

int StoreLayout::slots() const {
    const auto per_slot = static_cast<uint64_t>(units_per_slot);
    return per_slot ? static_cast<int>((units + per_slot - 1) / per_slot) : 0;
}

ExpertStore::ExpertStore(const PackIndex& index, const std::vector<std::unique_ptr<DirectFile>>& files,
                         StoreOptions options)
    : index_(index),
      files_(files),
      options_(options),
      layout_(index, options.all_levels),
      owner_(static_cast<size_t>(layout_.units_per_slot) * options.slots, -1),
      is_stale_(owner_.size(), 0),
      arena_(layout_.unit * owner_.size()),
      ranking_(options.eviction, {}, 0) {
    std::vector<int32_t> layer_of;
    int longest_run = 1;
    for (const auto& [layer, experts] : index.experts) {
        first_expert_.resize(std::max<size_t>(first_expert_.size(), layer + 1), -1);
        first_expert_[layer] = static_cast<int32_t>(experts_.size());
        for (size_t expert = 0; expert < experts.sections.size(); ++expert) {
            const auto global = static_cast<int32_t>(experts_.size());
            experts_.emplace_back(layer, static_cast<int>(expert));
            first_piece_.push_back(static_cast<int32_t>(pieces_.size()));
            const auto levels = static_cast<int>(experts.sections[expert].size());
            for (int level = 0; level < levels;) {
                const int end = layout_.joined ? levels : level + 1;
                Piece piece{global, level, end, 0, 0};
                uint64_t place = 0;
                for (; level < end; ++level) {
                    const Matrices matrices = stored_matrices(experts.levels[level]);
                    const Placement placement(index.sections[experts.sections[expert][level]], matrices);
                    piece.bytes += placement.read_bytes();
                    place += placement.bytes();
                }
                piece.run = layout_.run(place);
                longest_run = std::max(longest_run, piece.run);
                pieces_.push_back(piece);
                layer_of.push_back(layer);
            }
        }
    }
    first_piece_.push_back(static_cast<int32_t>(pieces_.size()));
    ranking_ = EvictionRanking(options.eviction, std::move(layer_of), static_cast<int>(first_expert_.size()));
    hinted_.assign(experts_.size(), 0);
    demands_.reserve(experts_.size());
    runs_ = CheapestRuns(owner_.size(), longest_run);
    stale_.reserve(owner_.size());
    const auto stop = [this] {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
        }
        work_.notify_all();
    };
    readers_.start("read experts", 0, options.readers, [this](int) { read_loop(); }, stop);
}

StoreCounters ExpertStore::counters() const {
    std::lock_guard lock(mutex_);
    return counters_;
}

double LookAhead::worth(int readers) {
    constexpr double kPushedOut = 0.15;  // chance that what made room is missed before long
    int count = 0;
    for (double left = window_; left > 0 && read_ > 0; left -= read_ / readers, ++count) {
        const double saved = precision_ * std::min(left, read_);
        const double lost = (1 - precision_) * (std::max(read_ - left, 0.0) + kPushedOut * read_);
        if (saved <= lost) break;
    }
    return (++turns_ % 16 == 0 ? std::max(count, 1) : count) * std::max(bytes_, 1.0);
}

bool ExpertStore::wants_hints() const { return options_.prefetch && owner_.size() < layout_.units; }

void ExpertStore::hint(int layer, std::span<const Hint> experts) {
    std::lock_guard lock(mutex_);
    for (const int32_t global : hint_) {
        hinted_[global] = 0;
        reconsider(global);
    }
    hint_.clear();
    hints_.clear();
    ahead_.clear();
    if (experts.empty()) return;
    ahead_bytes_ = 0;
    ahead_limit_ = look_ahead_.worth(options_.readers);
    // A prediction may take a quarter of the memory at most: what it pushes out must be made up by what it brings in.
    experts = experts.first(std::min(experts.size(), static_cast<size_t>(options_.slots) / 4));
    int finest = 0;
    for (const Hint& expected : experts) {
        const int global = global_number(layer, expected.expert);
        hint_.push_back(global);
        hinted_[global] = 1;
        reconsider(global);
        finest = std::max(finest, piece_of(expected.level));
    }
    for (int number = 0; number <= finest; ++number)
        for (size_t i = 0; i < experts.size(); ++i)
            if (number <= piece_of(experts[i].level) && pieces(hint_[i])[number].unit < 0)
                hints_.push_back(first_piece_[hint_[i]] + number);
    if (!hints_.empty()) work_.notify_all();
}

const Section& ExpertStore::stored(int expert, int level) const {
    const auto [layer, number] = experts_[expert];
    return index_.sections[index_.experts.at(layer).sections[number][level]];
}

bool ExpertStore::can_leave(int number) const {
    const Piece& piece = pieces_[number];
    if (piece.pins > 0) return false;
    // The finer levels go with it. They are needed only where it is, but may be on their way.
    for (int32_t finer = number; finer < first_piece_[piece.expert + 1]; ++finer)
        if (pieces_[finer].state == State::queued || pieces_[finer].state == State::reading) return false;
    return true;
}

void ExpertStore::place(Piece& piece, int unit) {
    piece.unit = unit;
    reconsider(piece);
    std::fill_n(owner_.begin() + unit, piece.run, static_cast<int32_t>(&piece - pieces_.data()));
}

void ExpertStore::drop(Piece& piece) {
    reconsider(piece);
    std::fill_n(owner_.begin() + piece.unit, piece.run, -1);
    piece.unit = -1;
    piece.state = State::absent;
    piece.speculative = false;
}

void ExpertStore::evict(int number) {
    for (int32_t finer = first_piece_[pieces_[number].expert + 1] - 1; finer >= number; --finer) {
        Piece& piece = pieces_[finer];
        if (piece.unit < 0) continue;
        if (piece.speculative) counters_.prefetch_wasted += piece.sections();
        counters_.evictions += piece.sections();
        drop(piece);
    }
}

void ExpertStore::reconsider(const Piece& piece) {
    if (piece.unit < 0) return;
    for (int unit = piece.unit; unit < piece.unit + piece.run; ++unit)
        if (!std::exchange(is_stale_[unit], 1)) stale_.push_back(unit);
}

void ExpertStore::reconsider(int expert) {
    for (const Piece& piece : pieces(expert)) reconsider(piece);
}

void ExpertStore::begin_turn(int layer, int tokens) {
    layer_ = layer;
    passed_ = std::min(passed_ + ranking_.begin_turn(layer, tokens), static_cast<int>(first_expert_.size()));
}

void ExpertStore::update_runs() {
    const int layers = static_cast<int>(first_expert_.size());
    for (; passed_ > 0; --passed_) {
        const int layer = (layer_ - passed_ + 1 + layers) % layers;
        if (first_expert_[layer] < 0) continue;  // it is dense
        for (auto expert = static_cast<size_t>(first_expert_[layer]);
             expert < experts_.size() && experts_[expert].first == layer; ++expert)
            reconsider(static_cast<int>(expert));
    }
    for (const int32_t unit : stale_) {
        runs_.set(static_cast<size_t>(unit), cost_of(unit));
        is_stale_[unit] = 0;
    }
    stale_.clear();
}

Cost ExpertStore::cost_of(int unit) const {
    const int32_t number = owner_[unit];
    if (number < 0) return {};
    if (!can_leave(number)) return {Cost::Kind::stays, {}, 0};
    const Piece& piece = pieces_[number];
    return {hinted_[piece.expert] ? Cost::Kind::expected : Cost::Kind::leaves, ranking_.rank(number), -piece.level};
}

int ExpertStore::make_room(int run, bool for_prediction) {
    update_runs();
    const auto [begin, cost] = runs_.cheapest(run);
    if (cost.kind >= (for_prediction ? Cost::Kind::expected : Cost::Kind::stays)) return -1;
    for (int unit = begin; unit < begin + run; ++unit)
        if (owner_[unit] >= 0) evict(owner_[unit]);
    return begin;
}

bool ExpertStore::pin(const Demand& demand) {
    const std::span<Piece> needed = pieces(demand.expert).first(static_cast<size_t>(demand.end));
    std::array<Piece*, kMaxLevels> added;
    int missing = 0;
    for (Piece& piece : needed) {
        ++piece.pins;
        if (piece.unit < 0) added[missing++] = &piece;
    }
    reconsider(demand.expert);
    // Long runs first: they would not find a place between short ones.
    std::stable_sort(added.begin(), added.begin() + missing,
                     [](const Piece* left, const Piece* right) { return left->run > right->run; });
    for (int i = 0; i < missing; ++i) {
        const int unit = make_room(added[i]->run, false);
        if (unit < 0) {
            while (i-- > 0) drop(*added[i]);
            for (Piece& piece : needed) --piece.pins;
            reconsider(demand.expert);
            return false;
        }
        place(*added[i], unit);
    }
    ++counters_.experts_requested;
    if (std::ranges::all_of(needed, [](const Piece& piece) { return piece.state == State::present; }))
        ++counters_.experts_hit;
    Demand reads = demand;
    reads.next = reads.end;
    for (Piece& piece : needed) {
        if (piece.speculative) {
            (piece.state == State::present ? counters_.prefetch_used : counters_.prefetch_late) += piece.sections();
            piece.speculative = false;
        }
        if (piece.state != State::absent && piece.state != State::failed) continue;
        piece.state = State::queued;
        reads.next = std::min(reads.next, static_cast<int32_t>(&piece - needed.data()));
    }
    if (reads.next < reads.end) {
        if (std::exchange(idle_, false)) look_ahead_.observe_window(seconds_since(idle_since_));
        demands_.push_back(reads);
        work_.notify_one();
    }
    return true;
}

// Whether the next piece of `left` is read before that of `right`.
bool ExpertStore::before(const Demand& left, const Demand& right) const {
    const int l = left.next, r = right.next;
    if (left.tokens[l] != right.tokens[r]) return left.tokens[l] > right.tokens[r];
    if (left.weights[l] != right.weights[r]) return left.weights[l] > right.weights[r];
    return pieces_[first_piece_[left.expert] + l].bytes < pieces_[first_piece_[right.expert] + r].bytes;
}

bool ExpertStore::continues(int expert, int level) const {
    const Section &before = stored(expert, level - 1), &next = stored(expert, level);
    return is_whole_blocks(before) && is_whole_blocks(next) && before.extents[0].file == next.extents[0].file &&
           before.extents[0].offset + before.extents[0].length == next.extents[0].offset;
}

ExpertStore::Request ExpertStore::next_request() {
    if (!demands_.empty()) {
        const auto first_of_all = [&] {
            auto best = demands_.begin();
            for (auto other = best + 1; other != demands_.end(); ++other)
                if (before(*other, *best)) best = other;
            return best;
        };
        const auto chosen = first_of_all();
        const std::span<Piece> held = pieces(chosen->expert);
        Request request{chosen->expert, chosen->next, chosen->next, false};
        do {
            held[request.end++].state = State::reading;
            chosen->next = request.end;
            while (chosen->next < chosen->end && held[chosen->next].state != State::queued) ++chosen->next;
        } while (chosen->next == request.end && chosen->next < chosen->end &&
                 continues(chosen->expert, held[chosen->next].level) && first_of_all() == chosen);
        if (chosen->next == chosen->end) demands_.erase(chosen);
        return request;
    }
    // Predictions wait until the disk has nothing to do that is known to be needed.
    while (demands_reading_ == 0 && !hints_.empty() && ahead_bytes_ < ahead_limit_) {
        const int32_t number = hints_.front();
        hints_.pop_front();
        Piece& piece = pieces_[number];
        if (piece.unit >= 0 || (piece.level > 0 && pieces_[number - 1].unit < 0)) continue;
        const int unit = make_room(piece.run, true);
        if (unit < 0) {
            hints_.clear();
            break;
        }
        place(piece, unit);
        piece.speculative = true;
        piece.state = State::reading;
        reconsider(piece.expert);  // its coarser levels stay meanwhile
        counters_.prefetch_issued += piece.sections();
        ahead_.push_back(number);
        ahead_bytes_ += static_cast<double>(piece.bytes);
        const int32_t place = number - first_piece_[piece.expert];
        return {piece.expert, place, place + 1, true};
    }
    return {-1, 0, 0, false};
}

std::byte* ExpertStore::memory(int expert, int level) const {
    const Piece& piece = pieces_[first_piece_[expert] + piece_of(level)];
    uint64_t place = static_cast<uint64_t>(piece.unit) * layout_.unit;
    for (int coarser = piece.level; coarser < level; ++coarser) {
        const Matrices matrices = stored_matrices(index_.experts.at(experts_[expert].first).levels[coarser]);
        place += Placement(stored(expert, coarser), matrices).bytes();
    }
    return arena_.data() + place;
}

void ExpertStore::read(const Request& request, std::vector<std::byte>& scratch) const {
    const auto [layer, number] = experts_[request.expert];
    const int end_level = pieces_[first_piece_[request.expert] + request.end - 1].end;
    for (int level = pieces_[first_piece_[request.expert] + request.first].level; level < end_level;) {
        const Section& section = stored(request.expert, level);
        int end = level + 1;
        while (end < end_level && continues(request.expert, end)) ++end;
        if (end - level > 1) {
            std::array<std::span<std::byte>, kMaxLevels> targets;
            uint64_t bytes = 0;
            for (int i = level; i < end; ++i) {
                targets[i - level] = {memory(request.expert, i), stored(request.expert, i).extents[0].length};
                bytes += stored(request.expert, i).extents[0].length;
            }
            files_[section.extents[0].file]->read(section.extents[0].offset,
                                                  std::span(targets).first(static_cast<size_t>(end - level)), bytes);
        } else {
            const Matrices matrices = stored_matrices(index_.experts.at(layer).levels[level]);
            Placement(section, matrices).read(files_, memory(request.expert, level));
        }
        for (; level < end; ++level) check(request.expert, level, scratch);
    }
}

// Checksum and interleaving of a section that has been read.
void ExpertStore::check(int global, int number, std::vector<std::byte>& scratch) const {
    const auto [layer, expert] = experts_[global];
    const Matrices matrices = stored_matrices(index_.experts.at(layer).levels[number]);
    const Placement placement(stored(global, number), matrices);
    std::byte* place = memory(global, number);
    placement.verify(files_, place,
                     "layer " + std::to_string(layer) + " expert " + std::to_string(expert) +
                         (number ? " level " + std::to_string(number) : ""));
    placement.interleave(place, scratch.data());
}

void ExpertStore::read_loop() {
    std::vector<std::byte> scratch;
    for (const auto& [layer, experts] : index_.experts)
        for (const ExpertLevel& level : experts.levels)
            scratch.resize(std::max(scratch.size(), interleaving_bytes(stored_matrices(level))));
    std::unique_lock lock(mutex_);
    while (true) {
        Request request{-1, 0, 0, false};
        work_.wait(lock, [&] { return stop_ || (request = next_request()).expert >= 0; });
        if (stop_) return;
        const bool demanded = !request.speculative;
        if (demanded && !demands_.empty()) work_.notify_one();
        demands_reading_ += demanded;
        if (reading_++ == 0) reading_since_ = Clock::now();
        const uint64_t number = counters_.sections_read;
        lock.unlock();

        const auto begin = Clock::now();
        std::exception_ptr error;
        try {
            read(request, scratch);
        } catch (...) {
            error = std::current_exception();
        }
        if (options_.arrival_jitter.count() > 0) {
            const uint64_t mixed = (number + 1) * 0x9E3779B97F4A7C15u ^ static_cast<uint64_t>(request.expert) << 17;
            std::this_thread::sleep_for(options_.arrival_jitter * ((mixed >> 20) % 1000) / 1000);
        }

        lock.lock();
        uint64_t bytes = 0, sections = 0;
        for (int number = request.first; number < request.end; ++number) {
            Piece& piece = pieces(request.expert)[number];
            piece.state = error ? State::failed : State::present;
            bytes += piece.bytes;
            sections += piece.sections();
            if (error && std::exchange(piece.speculative, false)) counters_.prefetch_wasted += piece.sections();
        }
        reconsider(request.expert);
        if (!error) {
            counters_.sections_read += sections;
            counters_.bytes_read += bytes;
            if (demanded) look_ahead_.observe_read(seconds_since(begin), bytes);
        }
        if (--reading_ == 0) counters_.read_seconds += seconds_since(reading_since_);
        demands_reading_ -= demanded;
        if (demanded && demands_reading_ == 0 && demands_.empty()) {
            idle_ = true;
            idle_since_ = Clock::now();
        }
        if (error) error_ = error;
        ready_.notify_all();
        if (demands_reading_ == 0 && demands_.empty() && !hints_.empty()) work_.notify_all();
    }
}

ExpertWeights ExpertStore::weights(int global, int end) const {
    const auto [layer, expert] = experts_[global];
    ExpertWeights found{};
    for (int number = 0; number < end; ++number) {
        const Matrices matrices = stored_matrices(index_.experts.at(layer).levels[number]);
        const Placement placement(stored(global, number), matrices);
        for (size_t i = 0; i < matrices.size(); ++i)
            found.parts[i][number] = memory(global, number) + placement.place(i);
    }
    return found;
}

// After a failed pass: nothing that it asked for may still be under way, or its failure would meet the next pass.
void ExpertStore::abandon(std::unique_lock<std::mutex>& lock) {
    for (const Demand& demand : demands_)
        for (Piece& piece : pieces(demand.expert).first(static_cast<size_t>(demand.end)))
            if (piece.state == State::queued) drop(piece);
    demands_.clear();
    hints_.clear();
    ready_.wait(lock, [this] { return reading_ == 0; });
}

ExpertStream::ExpertStream(ExpertStore& store, int layer, int tokens, std::span<const Need> needs)
    : store_(store), needs_(needs.begin(), needs.end()), is_given_(needs.size(), 0) {
    for (int i = 0; i < static_cast<int>(needs.size());) {
        const int begin = i;
        while (i < static_cast<int>(needs.size()) && needs[i].expert == needs[begin].expert) ++i;
        Expert expert{
            {store.global_number(layer, needs[begin].expert), 0, store.piece_of(needs[i - 1].level) + 1, {}, {}},
            begin,
            i};
        experts_.push_back(expert);
    }
    items_.reserve(needs.size());
    unfinished_ = static_cast<int>(experts_.size());
    std::lock_guard lock(store.mutex_);
    // Nothing is read ahead from one pass to the next: the time between them, a user's perhaps, is no window.
    if (layer <= store.layer_) store.idle_ = false;
    store.begin_turn(layer, tokens);
    for (Expert& expert : experts_) {
        ExpertStore::Demand& demand = expert.demand;
        int32_t uses = 0, last_token = -1, at = expert.end;
        float weight = 0;
        for (int piece = demand.end - 1; piece >= 0; --piece) {
            for (; at > expert.first && store.piece_of(needs[at - 1].level) >= piece; --at) {
                uses += needs[at - 1].uses;
                last_token = std::max(last_token, needs[at - 1].last_token);
                weight += needs[at - 1].weight;
            }
            demand.tokens[piece] = uses;
            demand.weights[piece] = weight;
            store.ranking_.use(store.first_piece_[demand.expert] + piece, last_token, uses);
        }
    }
    // Those in memory first: they are computed while the others are read, and stay safe from eviction by them. Then
    // those of which something is.
    for (const bool whole : {true, false})
        for (Expert& expert : experts_) {
            const auto needed = store.pieces(expert.demand.expert).first(static_cast<size_t>(expert.demand.end));
            if (!expert.pinned && (whole ? needed.back() : needed.front()).unit >= 0)
                expert.pinned = store.pin(expert.demand);
        }
    for (const int32_t number : store.ahead_) {
        const auto& piece = store.pieces_[number];
        store.look_ahead_.observe_prediction(piece.unit >= 0 && !piece.speculative);
    }
    store.ahead_.clear();
    store.hints_.clear();
    // The others at once, as many as there is room for: they are read while the pass does something else, and before
    // what it expects next.
    for (Expert& expert : experts_)
        if (!expert.pinned && !(expert.pinned = store.pin(expert.demand))) break;
}

void ExpertStream::unpin(Expert& expert) {
    for (auto& piece : store_.pieces(expert.demand.expert).first(static_cast<size_t>(expert.demand.end))) --piece.pins;
    store_.reconsider(expert.demand.expert);
    expert.pinned = false;
    --unfinished_;
}

ExpertStream::~ExpertStream() {
    std::unique_lock lock(store_.mutex_);
    const bool complete = std::ranges::all_of(is_given_, [](uint8_t given) { return given != 0; });
    for (Expert& expert : experts_)
        if (expert.pinned) unpin(expert);
    if (!complete) store_.abandon(lock);
}

std::span<const ExpertStream::Item> ExpertStream::next() {
    std::unique_lock lock(store_.mutex_);
    items_.clear();
    for (Expert& expert : experts_)
        if (expert.pinned && expert.given == expert.end - expert.first) unpin(expert);
    bool anew = false;
    while (unfinished_ > 0) {
        Expert* refused = nullptr;
        bool keeping = false;
        for (Expert& expert : experts_) {
            if (!expert.pinned && !refused && expert.given < expert.end - expert.first) {
                expert.pinned = store_.pin(expert.demand);
                if (!expert.pinned) refused = &expert;
            }
            if (!expert.pinned) continue;
            keeping = true;
            const auto held = store_.pieces(expert.demand.expert);
            int present = 0;
            while (present < expert.demand.end && held[present].state == ExpertStore::State::present) ++present;
            for (int i = expert.first; i < expert.end; ++i) {
                if (is_given_[i] || store_.piece_of(needs_[i].level) >= present) continue;
                items_.push_back({i, store_.weights(expert.demand.expert, needs_[i].level + 1)});
                is_given_[i] = 1;
                ++expert.given;
            }
            if (present < expert.demand.end && held[present].state == ExpertStore::State::failed)
                std::rethrow_exception(store_.error_);
        }
        if (!items_.empty()) break;
        if (refused && !keeping && store_.reading_ == 0) {
            // Nothing is kept, and yet what this expert has in memory leaves no long run free: it starts anew.
            if (std::exchange(anew, true)) throw std::runtime_error("the memory for experts does not hold one of them");
            store_.evict(store_.first_piece_[refused->demand.expert]);
            continue;
        }
        const auto begin = Clock::now();
        store_.ready_.wait(lock);
        store_.counters_.stall_seconds += seconds_since(begin);
    }
    return items_;
}

}  // namespace edgemoe
