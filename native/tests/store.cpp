// The expert cache: what it hands out is what the file holds, whatever leaves, is read ahead or fails.
#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <numeric>
#include <thread>
#include <tuple>

#include "check.h"
#include "edgemoe/crc32c.h"
#include "store/cheapest_runs.h"
#include "store/eviction.h"
#include "store/layout.h"
#include "store/stream.h"

namespace edgemoe::tests {
namespace {

constexpr int kExpertsPerLayer = 12;
constexpr int kLayerCount = 3;
constexpr int kRows = 16, kCols = 64;
constexpr size_t kPart = kRows * kCols * sizeof(float);
constexpr size_t kSectionBytes = 4 * kDiskBlock;  // three parts of a block each, and padding

struct Fixture {
    PackIndex index;
    std::vector<std::byte> content;
    std::unique_ptr<TemporaryFile> file;
    std::vector<std::unique_ptr<DirectFile>> files;

    Fixture() : content(kExpertsPerLayer * kLayerCount * kSectionBytes) {
        static_assert(kPart == kDiskBlock);
        for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<std::byte>(i / kDiskBlock * 7 + i);
        file = std::make_unique<TemporaryFile>(content);
        index.files = {file->path()};
        const StoredLayout stored = stored_layout("f32");
        for (int layer = 0; layer < kLayerCount; ++layer) {
            ExpertLayer& experts = index.experts[layer];
            ExpertLevel& level = experts.levels.emplace_back(ExpertLevel{32, {}});
            for (int part = 0; part < 3; ++part) level.parts[part] = {stored, 0, part * kPart, kRows, kCols};
            for (int expert = 0; expert < kExpertsPerLayer; ++expert) {
                const auto number = static_cast<uint32_t>(index.sections.size());
                const std::span bytes = std::span(content).subspan(number * kSectionBytes, kSectionBytes);
                index.sections.push_back({{{0, number * kSectionBytes, kSectionBytes}}, crc32c(bytes)});
                experts.sections.push_back({number});
            }
        }
        files.push_back(std::make_unique<DirectFile>(file->path()));
    }

    void check_weights(int layer, int expert, const ExpertWeights& weights) const {
        const std::byte* begin = content.data() + (layer * kExpertsPerLayer + expert) * kSectionBytes;
        for (int part = 0; part < 3; ++part)
            check(std::memcmp(weights.parts[part][0], begin + part * kPart, kPart) == 0,
                  "an expert has another one's weights");
    }
};

// Of 1 ... `most` different experts of a layer.
std::vector<ExpertStream::Need> some_needs(Random& random, int most, int of = kExpertsPerLayer) {
    std::vector<int32_t> experts(of);
    std::iota(experts.begin(), experts.end(), 0);
    std::shuffle(experts.begin(), experts.end(), random);
    std::vector<ExpertStream::Need> needs;
    for (int i = pick(random, 1, most); i > 0; --i) needs.push_back({experts[i - 1], 0, 0, 1, 1.0f});
    return needs;
}

void stream_all(const Fixture& fixture, ExpertStore& store, int layer, std::span<const ExpertStream::Need> needs) {
    ExpertStream stream(store, layer, {1, 1}, needs);
    std::vector<int> given(needs.size(), 0);
    for (auto items = stream.next(); !items.empty(); items = stream.next()) {
        for (const ExpertStream::Item& item : items) {
            ++given[item.position];
            fixture.check_weights(layer, needs[item.position].expert, item.weights);
        }
        stream.release();
    }
    check(std::ranges::all_of(given, [](int times) { return times == 1; }), "an expert was not given exactly once");
}

void test_streams(const Fixture& fixture) {
    Random random(2);
    for (const Eviction eviction : {Eviction::lru, Eviction::lfu, Eviction::least_stale, Eviction::next_use})
        for (const int slots : {1, 5, kExpertsPerLayer * kLayerCount}) {
            ExpertStore store(fixture.index, fixture.files,
                              {.slots = slots, .readers = 3, .eviction = eviction, .prefetch = slots > 1});
            uint64_t requested = 0;
            for (int pass = 0; pass < 12; ++pass)
                for (int layer = 0; layer < kLayerCount; ++layer) {
                    // More than there are slots, too.
                    const auto needs = some_needs(random, kExpertsPerLayer);
                    requested += needs.size();
                    if (store.wants_hints() && layer + 1 < kLayerCount) {
                        std::vector<ExpertStore::Hint> expected;
                        for (const auto& need : some_needs(random, 6)) expected.push_back({need.expert, 0});
                        store.hint(layer + 1, expected);
                    }
                    stream_all(fixture, store, layer, needs);
                }
            const StoreCounters counters = store.counters();
            check(counters.experts_requested == requested, "another number of experts was counted");
            check(counters.experts_hit <= requested && counters.bytes_read == counters.sections_read * kSectionBytes,
                  "the counters do not agree");
            if (slots == kExpertsPerLayer * kLayerCount)
                check(counters.evictions == 0, "an expert left a store with room for all");
        }
}

// A damaged section, and one that is missing: IoError, and everything else still works; repaired, it works too.
void test_failures(const Fixture& fixture) {
    const std::vector<ExpertStream::Need> needs{
        {0, 0, 0, 1, 1}, {1, 0, 0, 1, 1}, {2, 0, 0, 1, 1}, {3, 0, 0, 1, 1}, {4, 0, 0, 1, 1}};
    const std::vector<ExpertStream::Need> others{{5, 0, 0, 1, 1}, {6, 0, 0, 1, 1}};
    ExpertStore store(fixture.index, fixture.files, {.slots = 4, .readers = 2});
    for (const bool truncated : {false, true}) {
        std::vector<std::byte> damaged = fixture.content;
        damaged[(kExpertsPerLayer + 3) * kSectionBytes + 5000] ^= std::byte{1};
        if (truncated) damaged.resize((kExpertsPerLayer + 3) * kSectionBytes);
        fixture.file->write(damaged);
        check_throws<IoError>([&] { stream_all(fixture, store, 1, needs); }, "a damaged expert");
        stream_all(fixture, store, 0, others);
        fixture.file->write(fixture.content);
        stream_all(fixture, store, 1, needs);
        // Out of memory again, so that it must be read once more.
        for (int layer : {0, 2}) stream_all(fixture, store, layer, needs);
    }
}

// Now and then something is read ahead whether it pays or not: hints at one section until that happens.
template <class Condition>
StoreCounters hint_until(ExpertStore& store, int layer, ExpertStore::Hint expected, Condition&& condition) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    StoreCounters counters;
    do {
        store.hint(layer, {&expected, 1});
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the next hint takes this one's place
        counters = store.counters();
    } while (!condition(counters) && std::chrono::steady_clock::now() < deadline);
    return counters;
}

// What could not be read is no read, a prediction of it was in vain, and its place is free for others.
void test_failed_reads_are_not_counted(const Fixture& fixture) {
    const std::vector<ExpertStream::Need> needs{{3, 0, 0, 1, 1}};
    const std::vector<ExpertStream::Need> others{{0, 0, 0, 1, 1}, {1, 0, 0, 1, 1}, {2, 0, 0, 1, 1}, {4, 0, 0, 1, 1}};
    ExpertStore store(fixture.index, fixture.files, {.slots = 4, .readers = 2, .eviction = Eviction::lru});
    std::vector<std::byte> damaged = fixture.content;
    damaged[3 * kSectionBytes] ^= std::byte{1};
    fixture.file->write(damaged);
    check_throws<IoError>([&] { stream_all(fixture, store, 0, needs); }, "a damaged expert");
    StoreCounters counters = store.counters();
    check(counters.sections_read == 0 && counters.bytes_read == 0, "a failed read was counted");
    stream_all(fixture, store, 1, others);  // the damaged one leaves
    counters = hint_until(store, 0, {3, 0}, [](const StoreCounters& c) { return c.prefetch_wasted > 0; });
    check(counters.prefetch_issued == 1 && counters.prefetch_wasted == 1, "a failed prediction was not in vain");
    check(counters.sections_read == 4 && counters.bytes_read == 4 * kSectionBytes, "a failed prediction was counted");
    {
        ExpertStream stream(store, 2, {1, 1}, others);
        check(store.counters().experts_requested - counters.experts_requested == others.size(),
              "a failed prediction stays in memory");
        while (!stream.next().empty()) stream.release();
    }
    fixture.file->write(fixture.content);
    stream_all(fixture, store, 0, needs);
    counters = store.counters();
    check(counters.prefetch_used == 0 && counters.prefetch_late == 0 && counters.experts_hit == 0,
          "a failed prediction was of use");
    check(counters.sections_read == 9 && counters.prefetch_issued == 1, "what could not be read before was not read");
}

// A pass that ends while reads are under way, and a store that ends right after.
void test_abandoned(const Fixture& fixture) {
    for (int round = 0; round < 20; ++round) {
        ExpertStore store(fixture.index, fixture.files, {.slots = 6, .readers = 2});
        Random random(round);
        const auto needs = some_needs(random, kExpertsPerLayer);
        {
            ExpertStream stream(store, 0, {1, 1}, needs);
            if (round % 2) stream.next();
        }
        const std::vector<ExpertStore::Hint> expected{{1, 0}, {2, 0}, {3, 0}};
        store.hint(1, expected);
        if (round % 3 == 0) stream_all(fixture, store, 1, needs);
    }
}

// One of so many levels; its matrices take less than a block.
ExpertLevel a_level(size_t level, size_t levels) {
    const StoredLayout stored = stored_layout(level ? "refine1" : "base2r" + std::to_string(levels - 1));
    ExpertLevel result{2 + static_cast<int>(level), {}};
    for (ExpertPart& part : result.parts) part = {stored, 0, 0, kRows, kCols};
    return result;
}

// Experts of several levels, each of some blocks of its own; an expert has all of them, or all but the finest.
struct LevelsFixture {
    PackIndex index;
    std::vector<std::byte> content;
    std::unique_ptr<TemporaryFile> file;
    std::vector<std::unique_ptr<DirectFile>> files;
    std::vector<uint64_t> offsets;  // of sections

    LevelsFixture(int layers, int experts, std::span<const int> blocks, bool all_levels = true) {
        uint64_t offset = 0;
        for (int layer = 0; layer < layers; ++layer) {
            ExpertLayer& each = index.experts[layer];
            for (size_t level = 0; level < blocks.size(); ++level) {
                each.levels.push_back(a_level(level, blocks.size()));
            }
            for (int expert = 0; expert < experts; ++expert) {
                each.sections.emplace_back();
                for (size_t level = 0; level < blocks.size() - (!all_levels && expert % 3 == 0); ++level) {
                    each.sections.back().push_back(static_cast<uint32_t>(index.sections.size()));
                    index.sections.push_back({{{0, offset, blocks[level] * kDiskBlock}}, {}});
                    offsets.push_back(offset);
                    offset += blocks[level] * kDiskBlock;
                }
            }
        }
        content.resize(offset);
        for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<std::byte>(i / kDiskBlock * 7 + i);
        for (Section& section : index.sections)
            section.checksum = crc32c(std::span(content).subspan(section.extents[0].offset, section.extents[0].length));
        file = std::make_unique<TemporaryFile>(content);
        index.files = {file->path()};
        files.push_back(std::make_unique<DirectFile>(file->path()));
    }

    void stream_all(ExpertStore& store, int layer, std::span<const ExpertStream::Need> needs) const {
        ExpertStream stream(store, layer, {1, 1}, needs);
        size_t given = 0;
        for (auto items = stream.next(); !items.empty(); items = stream.next()) {
            for (const ExpertStream::Item& item : items) {
                ++given;
                const ExpertStream::Need& need = needs[item.position];
                for (int level = 0; level <= need.level; ++level)
                    check(std::memcmp(item.weights.parts[0][level],
                                      content.data() + offsets[index.experts.at(layer).sections[need.expert][level]],
                                      kDiskBlock) == 0,
                          "a level has another one's weights");
            }
            stream.release();
        }
        check(given == needs.size(), "a need was not given exactly once");
    }
};

// A long run must be found between short ones, also where every long run has something of the very expert that is asked
// for.
void test_levels() {
    constexpr int kBlocks[] = {1, 1, 2}, kExperts = 6, kLayers = 3;
    const LevelsFixture fixture(kLayers, kExperts, kBlocks);
    Random random(3);
    for (const int slots : {1, 2, 4, 8}) {
        ExpertStore store(fixture.index, fixture.files, {.slots = slots, .readers = 2});
        const auto some = [&](auto&& body) {
            for (int expert = 0; expert < kExperts; ++expert)
                if (pick(random, 0, 2) == 0) body(expert, pick(random, 0, 2));
        };
        for (int turn = 0; turn < 400; ++turn) {
            std::vector<ExpertStream::Need> needs;
            some([&](int expert, int level) { needs.push_back({expert, level, 0, 1, 1.0f}); });
            fixture.stream_all(store, turn % kLayers, needs);
            std::vector<ExpertStore::Hint> expected;
            some([&](int expert, int level) { expected.push_back({expert, level}); });
            store.hint(pick(random, 0, kLayers - 1), expected);
        }
    }
}

// While a level is read ahead, the coarser one stays, even if all memory is needed; afterwards it can leave.
void test_reading_ahead_keeps_coarser_levels() {
    constexpr int kBlocks[] = {1, 1, 2};
    const LevelsFixture fixture(3, 6, kBlocks);
    ExpertStore store(fixture.index, fixture.files,
                      {.slots = 4, .readers = 2, .arrival_jitter = std::chrono::milliseconds(50)});
    const std::vector<ExpertStream::Need> coarse{{0, 0, 0, 1, 1}};
    const std::vector<ExpertStream::Need> all{{1, 2, 0, 1, 1}, {2, 2, 0, 1, 1}, {3, 2, 0, 1, 1}, {4, 2, 0, 1, 1}};
    fixture.stream_all(store, 0, coarse);
    hint_until(store, 0, {0, 1}, [](const StoreCounters& counters) { return counters.prefetch_issued > 0; });
    {
        ExpertStream stream(store, 1, {1, 1}, all);
        const StoreCounters counters = store.counters();
        check(counters.prefetch_issued == 1, "nothing was read ahead");
        check(counters.experts_requested == 4 || counters.sections_read > 1, "a level left while a finer one was read");
        while (!stream.next().empty()) stream.release();
    }
    while (store.counters().sections_read < 2 + 4 * std::size(kBlocks)) std::this_thread::yield();
    const uint64_t requested = store.counters().experts_requested;
    const ExpertStream stream(store, 2, {1, 1}, all);
    check(store.counters().experts_requested == requested + 4, "a level does not leave after a finer one was read");
}

// The run of each length that should be taken, found by looking at all of them.
int cheapest_of_all(std::span<const Cost> units, int run, int longest_run, Cost& least) {
    const int count = static_cast<int>(units.size());
    const auto dearest = [&](int begin, int length) {
        return *std::max_element(units.begin() + begin, units.begin() + begin + length);
    };
    std::vector<std::tuple<Cost, bool, int>> all;
    for (int begin = 0; begin + run <= count; begin += run) {
        const Cost cost = dearest(begin, run);
        const int longer = begin / (2 * run) * 2 * run;
        const bool opens = cost.kind == Cost::Kind::free && run < longest_run && longer + 2 * run <= count &&
                           dearest(longer, 2 * run).kind == Cost::Kind::free;
        all.emplace_back(cost, opens, begin);
    }
    std::ranges::sort(all);
    least = all.empty() ? Cost{Cost::Kind::stays, {}, 0} : std::get<0>(all.front());
    return all.empty() ? 0 : std::get<2>(all.front());
}

void test_cheapest_runs() {
    Random random(4);
    for (const int longest : {1, 2, 8})
        for (const int units : {1, 7, 16, 53}) {
            CheapestRuns runs(static_cast<size_t>(units), longest);
            std::vector<Cost> costs(units);
            for (int round = 0; round < 2000; ++round) {
                // Few different costs, so that many are equal, and times when most units are free or in use.
                const int often = round / 100 % 4;
                const auto kind = static_cast<Cost::Kind>(pick(random, 0, 2) ? often : pick(random, 0, 3));
                Cost cost{kind, {}, 0};
                if (kind == Cost::Kind::leaves || kind == Cost::Kind::expected)
                    cost = {kind, {pick(random, 0, 3) * 0.5, pick(random, 0, 1) + 0ull}, -pick(random, 0, 1)};
                const int unit = pick(random, 0, units - 1);
                costs[unit] = cost;
                runs.set(static_cast<size_t>(unit), cost);
                for (int run = 1; run <= longest; run *= 2) {
                    Cost expected;
                    const int begin = cheapest_of_all(costs, run, longest, expected);
                    const CheapestRuns::Run found = runs.cheapest(run);
                    check(found.cost == expected, "there is a cheaper run");
                    check(found.begin == begin || expected.kind == Cost::Kind::stays,
                          "of equally cheap runs another one was chosen");
                }
            }
        }
}

// Which sections keep their rank while layers have their turns, and in what order their ranks put them.
void test_ranking() {
    constexpr int kLayers = 5, kPerLayer = 4, kSections = kLayers * kPerLayer;
    std::vector<int32_t> layer_of(kSections);
    for (int section = 0; section < kSections; ++section) layer_of[section] = section / kPerLayer;
    Random random(5);
    for (const Eviction policy : {Eviction::lru, Eviction::lfu, Eviction::least_stale, Eviction::next_use}) {
        EvictionRanking ranking(policy, layer_of, kLayers);
        std::vector<int> used(kSections, 0), used_in_pass(kSections, -1);
        int layer = -1, pass = 0, time = 0, last_rows = 1;
        for (int turn = 0; turn < 500; ++turn) {
            std::vector<EvictionRanking::Rank> before;
            for (int section = 0; section < kSections; ++section) before.push_back(ranking.rank(section));
            const int last = layer;
            layer = pick(random, 0, 3) ? (layer + 1) % kLayers : pick(random, 0, kLayers - 1);
            pass += layer <= last;
            const int rows = pick(random, 0, 1) ? 1 : pick(random, 1, 40);
            const int passed = ranking.begin_turn(layer, {rows, pick(random, 1, rows)});
            check(passed == (layer - last - 1 + kLayers) % kLayers + 1 ||
                      (passed == kLayers && policy == Eviction::next_use && rows != last_rows),
                  "another number of layers was passed");
            last_rows = rows;
            std::vector<uint8_t> may_change(kSections, 0);
            for (int section = 0; section < kSections; ++section)
                may_change[section] = (layer - layer_of[section] + kLayers) % kLayers < passed;
            for (int i = 0; i < kPerLayer; ++i) {
                if (pick(random, 0, 1)) continue;
                const int section = layer * kPerLayer + i;
                const int last_row = pick(random, 0, rows - 1);
                ranking.use(section, last_row, pick(random, 1, last_row + 1));
                used[section] = ++time;
                used_in_pass[section] = pass;
            }
            for (int section = 0; section < kSections; ++section)
                check(may_change[section] || ranking.rank(section) == before[section],
                      "the rank of a section has changed that nothing happened to");
            const auto away = [&](int section) { return (layer_of[section] - layer - 1 + kLayers) % kLayers; };
            const auto stale = [&](int section) { return used_in_pass[section] < pass; };
            for (int left = 0; left < kSections; ++left)
                for (int right = 0; right < kSections; ++right) {
                    const auto l = ranking.rank(left), r = ranking.rank(right);
                    if (policy == Eviction::least_stale && stale(left) && !stale(right))
                        check(l < r, "what this pass used leaves before what it did not");
                    if (policy == Eviction::least_stale && stale(left) == stale(right))
                        check((l < r) == (used[left] < used[right]), "the least recently used does not leave first");
                    if (policy == Eviction::next_use && l.first == r.first)
                        check((l < r) == (away(left) > away(right)), "the layer that comes last does not leave first");
                }
        }
    }
}

// Where a pass has many rows, what leaves first is of the layer that was just computed, unless it is used much more
// than others; with one row it is what is used least, wherever it is.
void test_ranking_of_wide_turns() {
    constexpr int kLayers = 8, kPerLayer = 2, kSections = kLayers * kPerLayer;
    std::vector<int32_t> layer_of(kSections);
    for (int section = 0; section < kSections; ++section) layer_of[section] = section / kPerLayer;
    for (const int rows : {1, 32}) {
        EvictionRanking ranking(Eviction::next_use, layer_of, kLayers);
        for (int pass = 0; pass < 100; ++pass)
            for (int layer = 0; layer < kLayers - (pass == 99 ? 3 : 0); ++layer) {
                ranking.begin_turn(layer, {rows, 1});
                // One row in four uses the first of them, one in eight the second.
                for (int i = 0; i < kPerLayer; ++i)
                    if (rows > 1 || pass % (4 << i) == 0)
                        ranking.use(layer * kPerLayer + i, rows - 1, std::max(rows >> (2 + i), 1));
            }
        const int last = (kLayers - 3 - 1) * kPerLayer, before = last - kPerLayer, next = last + kPerLayer;
        check(ranking.rank(last) < ranking.rank(before) && ranking.rank(before) < ranking.rank(next),
              "of what is used alike, that whose layer comes last does not leave first");
        check((ranking.rank(last) < ranking.rank(next + 1)) == (rows > 1),
              "what is rarely used is not kept for a pass of many rows, or for one of a single row");
    }
}

// Passes that use most of each layer's experts find those that stayed, for something of each layer stays.
void test_wide_turns_keep_some_of_each_layer() {
    constexpr int kLayers = 6, kExperts = 32, kSlots = kLayers * kExperts / 4, kRows = 32, kBlocks[] = {1};
    const LevelsFixture fixture(kLayers, kExperts, kBlocks);
    const auto hit_rate = [&](Eviction policy) {
        ExpertStore store(fixture.index, fixture.files,
                          {.slots = kSlots, .readers = 2, .eviction = policy, .prefetch = false});
        Random random(12);
        StoreCounters before;
        for (int pass = 0; pass < 30; ++pass) {
            if (pass == 10) before = store.counters();
            for (int layer = 0; layer < kLayers; ++layer) {
                std::vector<ExpertStream::Need> needs;
                for (int expert = 0; expert < kExperts; ++expert)
                    if (pick(random, 0, 4)) needs.push_back({expert, 0, pick(random, 0, kRows - 1), 1, 1.0f});
                ExpertStream stream(store, layer, {kRows, 1}, needs);
                while (!stream.next().empty()) stream.release();
            }
        }
        const StoreCounters after = store.counters();
        return static_cast<double>(after.experts_hit - before.experts_hit) /
               static_cast<double>(after.experts_requested - before.experts_requested);
    };
    const double found = hit_rate(Eviction::next_use), recent = hit_rate(Eviction::lru);
    check(found > 0.2, "a quarter of the experts in memory hits " + std::to_string(found));
    check(recent < 0.05, "the rows do not do what they are there for: " + std::to_string(recent));
}

// What the store should do, done in the simplest way: whenever room is needed, the costs of all units are found out
// anew.
class Reference {
  public:
    Reference(const PackIndex& index, int slots, Eviction policy)
        : layout_(index, false),
          owner_(static_cast<size_t>(slots) * layout_.units_per_slot(), -1),
          ranking_(policy, {}, 0) {
        std::vector<int32_t> layer_of;
        for (const auto& [layer, experts] : index.experts)
            for (const std::vector<uint32_t>& sections : experts.sections)
                for (const uint32_t number : sections) {
                    Held& held = held_.emplace_back();
                    held.coarsest = static_cast<int>(sections.front());
                    held.end = static_cast<int>(sections.back()) + 1;
                    held.run = layout_.run(index.sections[number].extents[0].length);
                    longest_run_ = std::max(longest_run_, held.run);
                    layer_of.push_back(layer);
                }
        ranking_ = EvictionRanking(policy, layer_of, static_cast<int>(index.experts.size()));
    }

    bool holds(int section) const { return held_[section].unit >= 0; }

    // All levels that these sections' experts have in memory are expected next.
    void expect(std::span<const int> coarsest) {
        for (Held& held : held_) held.expected = std::ranges::count(coarsest, held.coarsest) > 0;
    }

    // A turn of one token, whose experts need their levels up to the given sections. There is room for all.
    void turn(int layer, std::span<const int> finest) {
        ranking_.begin_turn(layer, {1, 1});
        for (const int last : finest)
            for (int section = last; section >= held_[last].coarsest; --section) ranking_.use(section, 0, 1);
        std::vector<int> order;
        for (const auto& comes : {&Reference::has_all, &Reference::has_some, &Reference::has_any})
            for (const int last : finest) {
                if (std::ranges::count(order, last) || !(this->*comes)(last)) continue;
                order.push_back(last);
                pin(last);
            }
        for (Held& held : held_) held.pinned = false;
    }

    uint64_t hits = 0, evictions = 0;

  private:
    struct Held {
        int coarsest, end, run;  // of the expert: the first section, and that after the last
        int unit = -1;
        bool pinned = false, expected = false;
    };

    bool has_all(int last) const { return holds(last); }
    bool has_some(int last) const { return holds(held_[last].coarsest); }
    bool has_any(int) const { return true; }

    void pin(int last) {
        hits += holds(last);
        std::vector<int> missing;
        for (int section = held_[last].coarsest; section <= last; ++section) {
            held_[section].pinned = true;
            if (!holds(section)) missing.push_back(section);
        }
        std::ranges::stable_sort(missing, std::greater(), [this](int section) { return held_[section].run; });
        for (const int section : missing) {
            std::vector<Cost> costs;
            for (const int owner : owner_) costs.push_back(owner < 0 ? Cost{} : cost(owner));
            const int run = held_[section].run;
            Cost least;
            const int begin = cheapest_of_all(costs, run, longest_run_, least);
            check(least.kind != Cost::Kind::stays, "the reference has no room");
            for (int unit = begin; unit < begin + run; ++unit)
                if (owner_[unit] >= 0) evict(owner_[unit]);
            held_[section].unit = begin;
            std::fill_n(owner_.begin() + begin, run, section);
        }
    }

    Cost cost(int section) const {
        const Held& held = held_[section];
        if (held.pinned) return {Cost::Kind::stays, {}, 0};
        return {held.expected ? Cost::Kind::expected : Cost::Kind::leaves, ranking_.rank(section),
                held.coarsest - section};
    }

    void evict(int section) {
        for (int finer = section; finer < held_[section].end; ++finer) {
            if (!holds(finer)) continue;
            ++evictions;
            std::fill_n(owner_.begin() + held_[finer].unit, held_[finer].run, -1);
            held_[finer].unit = -1;
        }
    }

    StoreLayout layout_;
    int longest_run_ = 1;
    std::vector<Held> held_;  // [sections]
    std::vector<int> owner_;  // [units]
    EvictionRanking ranking_;
};

void test_victims() {
    constexpr int kExperts = 10, kSlots = 8;
    Random random(6);
    for (const std::vector<int>& blocks : {std::vector{1}, std::vector{2, 1, 1}, std::vector{4, 1, 2}}) {
        const LevelsFixture fixture(kLayerCount, kExperts, blocks, blocks.size() == 1);
        for (const Eviction policy : {Eviction::lru, Eviction::lfu, Eviction::least_stale, Eviction::next_use}) {
            ExpertStore store(fixture.index, fixture.files,
                              {.slots = kSlots, .readers = 2, .eviction = policy, .prefetch = false});
            Reference reference(fixture.index, kSlots, policy);
            for (int turn = 0; turn < 300; ++turn) {
                // Now and then another layer than the next one, as after a pass that failed.
                const int layer = pick(random, 0, 9) ? turn % kLayerCount : pick(random, 0, kLayerCount - 1);
                // Only what is in memory: what is read ahead would come at any time.
                const int next = pick(random, 0, kLayerCount - 1);
                std::vector<ExpertStore::Hint> hints;
                std::vector<int> expected;
                for (const auto& need : some_needs(random, kExperts, kExperts)) {
                    const auto coarsest = static_cast<int>(fixture.index.experts.at(next).sections[need.expert][0]);
                    if (hints.size() == kSlots / 4 || !reference.holds(coarsest)) continue;
                    hints.push_back({need.expert, 0});
                    expected.push_back(coarsest);
                }
                store.hint(next, hints);
                reference.expect(expected);
                std::vector<ExpertStream::Need> needs = some_needs(random, kSlots / 2, kExperts);
                std::vector<int> finest;
                for (ExpertStream::Need& need : needs) {
                    const auto& sections = fixture.index.experts.at(layer).sections[need.expert];
                    need.level = pick(random, 0, static_cast<int>(sections.size()) - 1);
                    finest.push_back(static_cast<int>(sections[need.level]));
                }
                reference.turn(layer, finest);
                fixture.stream_all(store, layer, needs);
                const StoreCounters counters = store.counters();
                check(counters.experts_hit == reference.hits && counters.evictions == reference.evictions,
                      "another section left than the cheapest");
            }
            check(reference.evictions > 100 && reference.hits > 100, "too little happened to tell");
        }
    }
}

// The memory that sections of so many blocks take, in all, for each block of them; and units for an expert.
std::pair<double, double> memory_of(std::span<const int> blocks, bool may_join, bool all_levels = true) {
    constexpr int kExperts = 6;
    PackIndex index;
    ExpertLayer& layer = index.experts[0];
    for (size_t level = 0; level < blocks.size(); ++level) {
        layer.levels.push_back(a_level(level, blocks.size()));
    }
    uint64_t offset = 0;
    for (int expert = 0; expert < kExperts; ++expert) {
        layer.sections.emplace_back();
        for (size_t level = 0; level < (all_levels ? blocks.size() : expert % blocks.size() + 1); ++level) {
            layer.sections.back().push_back(static_cast<uint32_t>(index.sections.size()));
            index.sections.push_back({{{0, offset, blocks[level] * kDiskBlock}}, {}});
            offset += blocks[level] * kDiskBlock;
        }
    }
    const StoreLayout layout(index, may_join);
    check(layout.unit() % kDiskBlock == 0, "a unit is not of whole disk blocks");
    return {static_cast<double>(layout.units() * layout.unit()) / static_cast<double>(offset),
            static_cast<double>(layout.units()) / kExperts};
}

// Levels of 2, 3 and 4 bits: of Qwen3-30B-A3B, of the bundled model, and of that one with 8 times the stream and 16
// times the units.
void test_waste() {
    for (const std::vector<int>& blocks :
         {std::vector{342, 162, 162}, std::vector{15, 7, 7}, std::vector{1824, 864, 864}}) {
        const auto [joined, joined_units] = memory_of(blocks, true);
        check(joined == 1 && joined_units == 1, "experts that are always whole waste memory");
        const auto [apart, apart_units] = memory_of(blocks, false);
        check(apart <= (blocks[0] < 100 ? 1.104 : 1.028) && apart_units <= 4,
              "levels waste memory, or take many units");
        // Of unequal experts the levels fit better than the sums.
        const auto [mixed, mixed_units] = memory_of(blocks, true, false);
        check(mixed <= memory_of(blocks, false, false).first && mixed_units <= 4, "unequal experts waste memory");
    }
}

// Levels that never work without each other come and leave as the one level of an expert that is as large.
void test_joined_levels() {
    constexpr int kExperts = 10, kSlots = 8, kBlocks[] = {2, 1, 1}, kWhole[] = {4};
    const LevelsFixture fixture(kLayerCount, kExperts, kBlocks), plain(kLayerCount, kExperts, kWhole);
    Random random(8);
    for (const Eviction policy : {Eviction::lru, Eviction::next_use}) {
        const StoreOptions options{.slots = kSlots, .eviction = policy, .prefetch = false};
        StoreOptions joining = options;
        joining.all_levels = true;
        ExpertStore store(fixture.index, fixture.files, joining), other(plain.index, plain.files, options);
        for (int turn = 0; turn < 200; ++turn) {
            std::vector<ExpertStream::Need> needs = some_needs(random, kSlots / 2, kExperts);
            plain.stream_all(other, turn % kLayerCount, needs);
            for (ExpertStream::Need& need : needs) need.level = std::size(kBlocks) - 1;
            fixture.stream_all(store, turn % kLayerCount, needs);
        }
        const StoreCounters a = store.counters(), b = other.counters();
        check(a.experts_hit == b.experts_hit && a.experts_requested == b.experts_requested && a.experts_hit > 50,
              "joined levels are not in memory as one level would be");
        check(a.sections_read == std::size(kBlocks) * b.sections_read && a.bytes_read == b.bytes_read &&
                  a.evictions == std::size(kBlocks) * b.evictions,
              "joined levels are not read and dropped together");
    }
    ExpertStore store(fixture.index, fixture.files, {.slots = kSlots, .all_levels = true});
    const int finest = std::size(kBlocks) - 1;
    const StoreCounters counters =
        hint_until(store, 1, {3, finest}, [](const StoreCounters& c) { return c.sections_read > 0; });
    check(counters.prefetch_issued == std::size(kBlocks) && counters.sections_read == std::size(kBlocks),
          "joined levels are not read ahead together");
    const std::vector<ExpertStream::Need> needs{{3, finest, 0, 1, 1}};
    fixture.stream_all(store, 1, needs);
    check(store.counters().prefetch_used == std::size(kBlocks), "joined levels that were read ahead are not used");
}

// What was given stays until it is released, however little room there is, and whatever else is read meanwhile.
void test_release(const Fixture& fixture) {
    constexpr int kSlots = 5;
    std::vector<ExpertStream::Need> needs;
    for (int expert = 0; expert < kExpertsPerLayer; ++expert) needs.push_back({expert, 0, 0, 1, 1});
    const std::vector<ExpertStore::Hint> expected{{3, 0}};
    for (int round = 0; round < 20; ++round) {
        ExpertStore store(fixture.index, fixture.files, {.slots = kSlots, .readers = 2});
        ExpertStream stream(store, 0, {1, 1}, needs);
        std::vector<ExpertStream::Item> held;
        size_t given = 0;
        const auto check_held = [&] {
            for (const ExpertStream::Item& item : held)
                fixture.check_weights(0, needs[item.position].expert, item.weights);
        };
        int times_blocked = 0;
        while (given < needs.size()) {
            store.hint(1, expected);
            const auto items = stream.next();
            check(items.empty() == stream.blocked(), "a stream gives nothing and is not blocked, or both");
            check_held();
            if (!items.empty()) {
                given += items.size();
                held.insert(held.end(), items.begin(), items.end());
                check(held.size() <= kSlots, "more experts are given than there is room for");
                // Now and then as the CPU does it: nothing is held when the next ones are asked for.
                if (round % 4 != 3) continue;
            } else {
                ++times_blocked;
                check(held.size() >= kSlots - 1, "a stream is blocked while there is room");
                check_throws<std::logic_error>([&] { stream.next(); }, "a blocked stream");
                check_held();
            }
            stream.release();
            held.clear();
        }
        check((times_blocked > 0) == (round % 4 != 3), "a stream is blocked that releases, or the other way round");
        check(stream.next().empty() && !stream.blocked(), "a stream goes on after its last expert");
        check_held();
    }
}

// An expert of which one level was given and another is being read stays whole, released or not.
void test_release_of_levels() {
    constexpr int kBlocks[] = {2, 1, 1}, kExperts = 6;
    const LevelsFixture fixture(2, kExperts, kBlocks);
    std::vector<ExpertStream::Need> needs;
    for (int expert = 0; expert < kExperts; ++expert)
        for (int level = 0; level < 3; ++level) needs.push_back({expert, level, 0, 1, 1});
    for (const bool at_once : {true, false}) {
        ExpertStore store(fixture.index, fixture.files,
                          {.slots = 2, .readers = 3, .arrival_jitter = std::chrono::milliseconds(2)});
        ExpertStream stream(store, 0, {1, 1}, needs);
        std::vector<ExpertStream::Item> held;
        size_t given = 0;
        while (given < needs.size()) {
            const auto items = stream.next();
            given += items.size();
            held.insert(held.end(), items.begin(), items.end());
            for (const ExpertStream::Item& item : held)
                for (int level = 0; level <= needs[item.position].level; ++level)
                    check(
                        std::memcmp(
                            item.weights.parts[0][level],
                            fixture.content.data() +
                                fixture
                                    .offsets[fixture.index.experts.at(0).sections[needs[item.position].expert][level]],
                            kDiskBlock) == 0,
                        "a level that was given has changed");
            if (!at_once && !items.empty()) continue;
            stream.release();
            held.clear();
        }
    }
}

// What is missing is being read while the pass does something else before it asks for it.
void test_reads_begin_with_the_stream(const Fixture& fixture) {
    ExpertStore store(fixture.index, fixture.files, {.slots = 6, .readers = 2});
    const std::vector<ExpertStream::Need> needs{{0, 0, 0, 1, 1}, {1, 0, 0, 1, 1}};
    const ExpertStream stream(store, 0, {1, 1}, needs);
    check(store.counters().experts_requested == needs.size(), "a stream does not ask for what is missing at once");
}

}  // namespace

void test_store() {
    const Fixture fixture;
    test_streams(fixture);
    test_failures(fixture);
    test_abandoned(fixture);
    test_failed_reads_are_not_counted(fixture);
    test_levels();
    test_reading_ahead_keeps_coarser_levels();
    test_cheapest_runs();
    test_ranking();
    test_ranking_of_wide_turns();
    test_wide_turns_keep_some_of_each_layer();
    test_victims();
    test_waste();
    test_joined_levels();
    test_reads_begin_with_the_stream(fixture);
    test_release(fixture);
    test_release_of_levels();
}

}  // namespace edgemoe::tests
