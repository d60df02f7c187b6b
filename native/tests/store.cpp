// The expert cache: what it hands out is what the file holds, whatever leaves, is read ahead or fails.
#include <algorithm>
#include <memory>

#include "check.h"
#include "edgemoe/crc32c.h"
#include "edgemoe/expert_store.h"

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

std::vector<ExpertStream::Need> some_needs(Random& random, int most) {
    std::vector<int32_t> experts(kExpertsPerLayer);
    for (int i = 0; i < kExpertsPerLayer; ++i) experts[i] = i;
    std::shuffle(experts.begin(), experts.end(), random);
    std::vector<ExpertStream::Need> needs;
    for (int i = pick(random, 1, most); i > 0; --i) needs.push_back({experts[i - 1], 0, 0, 1, 1.0f});
    return needs;
}

void stream_all(const Fixture& fixture, ExpertStore& store, int layer, std::span<const ExpertStream::Need> needs) {
    ExpertStream stream(store, layer, 1, needs);
    std::vector<int> given(needs.size(), 0);
    for (auto items = stream.next(); !items.empty(); items = stream.next())
        for (const ExpertStream::Item& item : items) {
            ++given[item.position];
            fixture.check_weights(layer, needs[item.position].expert, item.weights);
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

// A pass that ends while reads are under way, and a store that ends right after.
void test_abandoned(const Fixture& fixture) {
    for (int round = 0; round < 20; ++round) {
        ExpertStore store(fixture.index, fixture.files, {.slots = 6, .readers = 2});
        Random random(round);
        const auto needs = some_needs(random, kExpertsPerLayer);
        {
            ExpertStream stream(store, 0, 1, needs);
            if (round % 2) stream.next();
        }
        const std::vector<ExpertStore::Hint> expected{{1, 0}, {2, 0}, {3, 0}};
        store.hint(1, expected);
        if (round % 3 == 0) stream_all(fixture, store, 1, needs);
    }
}

// Levels of one, one and two blocks: a long run must be found between short ones, also where every long run has
// something of the very expert that is asked for.
void test_levels() {
    constexpr int kLevels = 3, kExperts = 6, kPerExpert = 4;  // blocks
    std::vector<std::byte> content(kExperts * kPerExpert * kDiskBlock);
    for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<std::byte>(i / kDiskBlock * 7 + i);
    const TemporaryFile file(content);
    PackIndex index;
    index.files = {file.path()};
    const StoredLayout stored = stored_layout("f32");
    ExpertLayer& experts = index.experts[0];
    for (int level = 0; level < kLevels; ++level) {
        experts.levels.push_back({2 + level, {}});
        for (ExpertPart& part : experts.levels.back().parts) part = {stored, 0, 0, kRows, kCols};
    }
    uint64_t offset = 0;
    for (int expert = 0; expert < kExperts; ++expert) {
        experts.sections.emplace_back();
        for (int level = 0; level < kLevels; ++level) {
            const uint64_t bytes = (level == 2 ? 2 : 1) * kDiskBlock;
            experts.sections.back().push_back(static_cast<uint32_t>(index.sections.size()));
            index.sections.push_back({{{0, offset, bytes}}, crc32c(std::span(content).subspan(offset, bytes))});
            offset += bytes;
        }
    }
    std::vector<std::unique_ptr<DirectFile>> files;
    files.push_back(std::make_unique<DirectFile>(file.path()));
    Random random(3);
    for (const int slots : {1, 2, 4}) {
        ExpertStore store(index, files, {.slots = slots, .readers = 2});
        for (int turn = 0; turn < 400; ++turn) {
            std::vector<ExpertStream::Need> needs;
            for (int expert = 0; expert < kExperts; ++expert)
                if (pick(random, 0, 2) == 0) needs.push_back({expert, pick(random, 0, kLevels - 1), 0, 1, 1.0f});
            ExpertStream stream(store, 0, 1, needs);
            size_t given = 0;
            for (auto items = stream.next(); !items.empty(); items = stream.next())
                for (const ExpertStream::Item& item : items) {
                    ++given;
                    const ExpertStream::Need& need = needs[item.position];
                    for (int level = 0; level <= need.level; ++level)
                        check(std::memcmp(item.weights.parts[0][level],
                                          content.data() + (need.expert * kPerExpert + level) * kDiskBlock,
                                          kDiskBlock) == 0,
                              "a level has another one's weights");
                }
            check(given == needs.size(), "a need was not given exactly once");
        }
    }
}

// What is missing is being read while the pass does something else before it asks for it.
void test_reads_begin_with_the_stream(const Fixture& fixture) {
    ExpertStore store(fixture.index, fixture.files, {.slots = 6, .readers = 2});
    const std::vector<ExpertStream::Need> needs{{0, 0, 0, 1, 1}, {1, 0, 0, 1, 1}};
    const ExpertStream stream(store, 0, 1, needs);
    check(store.counters().experts_requested == needs.size(), "a stream does not ask for what is missing at once");
}

}  // namespace

void test_store() {
    const Fixture fixture;
    test_streams(fixture);
    test_failures(fixture);
    test_abandoned(fixture);
    test_levels();
    test_reads_begin_with_the_stream(fixture);
}

}  // namespace edgemoe::tests
