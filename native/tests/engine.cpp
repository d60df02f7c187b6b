// A small mixture of experts with random weights: the same logits, to the bit, however it is run.
#include "edgemoe/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>

#include "check.h"
#include "edgemoe/crc32c.h"
#include "small_model.h"

namespace edgemoe::tests {
namespace {

Aligned<float> logits(Engine& engine, int count, int step) {
    std::vector<int32_t> tokens(count), positions(count), ids(count, 0), wanted(count);
    Random random(4);
    for (int32_t& token : tokens) token = pick(random, 0, kVocabulary - 1);
    std::iota(positions.begin(), positions.end(), 0);
    std::iota(wanted.begin(), wanted.end(), 0);
    Aligned<float> result(static_cast<size_t>(count) * kVocabulary);
    for (int done = 0; done < count; done += step) {
        const int size = std::min(step, count - done);
        const Batch batch{.tokens = std::span(tokens).subspan(done, size),
                          .positions = std::span(positions).subspan(done, size),
                          .sequences = std::span(ids).first(size),
                          .wanted = std::span(wanted).first(size)};
        engine.forward(batch, result.data() + static_cast<size_t>(done) * kVocabulary, [] {});
    }
    return result;
}

void test_model(const Model& model, KvType kv_type) {
    constexpr int count = 68;
    const int all = kExperts * (kLayerCount - 1);
    const auto run = [&](EngineOptions options, int step) {
        options.context = kContext;
        options.key_type = options.value_type = kv_type;
        const MemoryPlan plan = Engine::plan(model.spec, model.index, options);
        check(plan.minimum_slots == kTopK && plan.experts == all, "the plan has other numbers of experts");
        Engine engine(model.spec, model.index, options);
        return logits(engine, count, step);
    };
    EngineOptions options{.threads = 1, .chunk = 64, .store = {.slots = all}, .isa = "scalar"};
    const auto expected = run(options, count);
    bool finite = true;
    for (const float value : expected.span()) finite &= std::isfinite(value);
    check(finite, "the model's logits are not all numbers");
    for (const std::string_view isa : available_isas()) {
        options.isa = isa;
        const std::string name(isa);
        options.threads = 3;
        check_same(expected, run(options, count), name + ", three threads");
        options.chunk = 7;
        check_same(expected, run(options, 13), name + ", other chunks");
    }
    for (const bool prefetch : {false, true}) {
        const Eviction eviction = prefetch ? Eviction::next_use : Eviction::lru;
        options.store = {.slots = kTopK + (prefetch ? 2 : 0), .readers = 2, .eviction = eviction, .prefetch = prefetch};
        check_same(expected, run(options, count), "few experts in memory");
        check_same(expected, run(options, 1), "few experts in memory, token by token");
    }
}

void test_damage() {
    const Model model("q4g64", "q4g64", false);
    EngineOptions options{.threads = 2, .context = kContext, .chunk = 16, .store = {.slots = kTopK}, .isa = ""};
    Engine engine(model.spec, model.index, options);
    auto damaged = model.content;
    for (const auto& sections : model.index.experts.at(1).sections)
        damaged[model.index.sections[sections[0]].extents[0].offset + 17] ^= std::byte{4};
    model.file->write(damaged);
    check_throws<IoError>([&] { logits(engine, 20, 20); }, "a model with damaged experts");
    check(engine.sequence(0).length() == 0, "a failed chunk left positions behind");
    model.file->write(model.content);
    Engine other(model.spec, model.index, options);
    check_same(logits(other, 20, 20), logits(engine, 20, 20), "after a failure");

    for (const auto& [name, tensor] : model.index.dense) {
        damaged = model.content;
        damaged[model.index.sections[tensor.section].extents[0].offset] ^= std::byte{1};
        model.file->write(damaged);
        check_throws<IoError>([&] { Engine(model.spec, model.index, options); }, name + ", damaged,");
        PackIndex index = model.index;
        index.sections[tensor.section].extents[0].length -= 4;
        index.sections[tensor.section].checksum.reset();
        check_throws<std::invalid_argument>([&] { Engine(model.spec, index, options); }, name + ", too short,");
    }
    damaged.resize(damaged.size() / 2);
    model.file->write(damaged);
    check_throws<std::runtime_error>(
        [&] {
            Engine truncated(model.spec, model.index, options);
            logits(truncated, 20, 20);
        },
        "half a file");
    model.file->write(model.content);
}

// A sequence that goes back, and one that is put aside and restored.
void test_sequences() {
    const Model model("q4g64", "q4g64", false);
    EngineOptions options{.threads = 2, .context = kContext, .chunk = 32, .store = {.slots = 6}, .isa = ""};
    Engine engine(model.spec, model.index, options);
    const auto expected = logits(engine, 70, 70);
    SequenceState& state = engine.sequence(0);
    std::vector<std::byte> snapshot(state.snapshot_bytes());
    state.snapshot(snapshot);
    for (const int length : {65, 64, 3, 0}) {
        state.truncate(length);
        check(state.length() == length, "a truncated sequence has another length");
    }
    check_same(expected, logits(engine, 70, 11), "the same tokens once more");
    state.truncate(0);
    state.restore(snapshot);
    check(state.length() == 70, "a restored sequence has another length");
    check_throws<std::invalid_argument>([&] { state.restore(std::span(snapshot).first(snapshot.size() - 1)); },
                                        "a snapshot that is too short");
    check_throws<ContextError>([&] { logits(engine, 5, 5); }, "tokens at positions that are taken");
}

// Several sequences in one engine: each has the bits it has alone, whatever becomes of the others.
void test_several_sequences() {
    const Model model("q4g64", "q4g64", false);
    EngineOptions options{.threads = 2,
                          .sequences = 3,
                          .context = kContext,
                          .positions = 3 * kContext,
                          .chunk = 16,
                          .store = {.slots = 6},
                          .isa = ""};
    EngineOptions one = options;
    one.sequences = 1;
    one.positions = 0;
    check(Engine::plan(model.spec, model.index, options).state == 3 * Engine::plan(model.spec, model.index, one).state,
          "three sequences are not planned as three");
    Engine engine(model.spec, model.index, options);
    constexpr int kCount = 130;
    std::vector<std::vector<int32_t>> tokens;
    std::vector<Aligned<float>> expected;
    Random random(5);
    const auto alone = [&](const std::vector<int32_t>& text) {
        Engine other(model.spec, model.index, one);
        std::vector<int32_t> positions(kCount), ids(kCount, 0);
        std::iota(positions.begin(), positions.end(), 0);
        Aligned<float> result(size_t{kCount} * kVocabulary);
        other.forward({.tokens = text, .positions = positions, .sequences = ids, .wanted = positions}, result.data(),
                      [] {});
        return result;
    };
    for (int i = 0; i < 3; ++i) {
        for (int32_t& token : tokens.emplace_back(kCount)) token = pick(random, 0, kVocabulary - 1);
        expected.push_back(alone(tokens.back()));
    }
    // Rows (text, sequence) whose logits must be those of the text alone; `check` as of Engine::forward.
    const auto run = [&](const std::vector<std::pair<int, int>>& rows, const std::function<void()>& check_layer) {
        std::vector<int32_t> batch, positions, ids, wanted(rows.size());
        std::map<int, int> lengths;
        for (const auto& [text, id] : rows) {
            const auto [place, fresh] = lengths.try_emplace(id, engine.sequence(id).length());
            batch.push_back(tokens[text][place->second]);
            positions.push_back(place->second++);
            ids.push_back(id);
        }
        std::iota(wanted.begin(), wanted.end(), 0);
        Aligned<float> result(rows.size() * kVocabulary);
        engine.forward({.tokens = batch, .positions = positions, .sequences = ids, .wanted = wanted}, result.data(),
                       check_layer);
        for (size_t row = 0; row < rows.size(); ++row)
            check(
                std::memcmp(&result[row * kVocabulary],
                            &expected[rows[row].first][size_t(positions[row]) * kVocabulary],
                            kVocabulary * sizeof(float)) == 0,
                "text " + std::to_string(rows[row].first) + " in company, position " + std::to_string(positions[row]));
    };
    const auto mixed = [&](std::vector<std::pair<int, int>> rows) {  // (text, sequence) -> a shuffled batch
        std::ranges::shuffle(rows, random);
        return rows;
    };
    const int second = engine.add_sequence(), third = engine.add_sequence();
    check_throws<StateError>([&] { engine.add_sequence(); }, "a fourth of three sequences");
    check_throws<std::invalid_argument>([&] { engine.sequence(third + 1); }, "a sequence that never was");
    std::vector<std::pair<int, int>> rows;
    for (int i = 0; i < 70; ++i) rows.insert(rows.end(), {{0, 0}, {1, second}});
    run(mixed(rows), [] {});

    // A batch that fails: 0 is at rest, the others are where they were, and all go on.
    const int failing[] = {second, third};
    rows.clear();
    for (int i = 0; i < 20; ++i) rows.insert(rows.end(), {{1, second}, {2, third}});
    const auto fail = [calls = 0]() mutable {
        if (++calls == 8) throw std::runtime_error("given up");  // in the third chunk of 16
    };
    check_throws<std::runtime_error>([&] { run(mixed(rows), fail); }, "a check that gives up");
    check(engine.sequence(0).length() == 70, "a failure reached a sequence that was not in the batch");
    check(engine.sequence(second).length() + engine.sequence(third).length() == 70 + 32,
          "finished chunks are not what is left after a failure");
    for (const int id : failing) engine.sequence(id).truncate(id == second ? 70 : 0);
    rows.clear();
    for (int i = 0; i < 60; ++i) rows.insert(rows.end(), {{0, 0}, {1, second}});
    for (int i = 0; i < 90; ++i) rows.push_back({2, third});
    run(mixed(rows), [] {});

    // One that goes makes room, and its number is used again; the others stay.
    engine.remove_sequence(second);
    check_throws<std::invalid_argument>([&] { engine.sequence(second); }, "a sequence that was removed");
    check_throws<std::invalid_argument>([&] { engine.remove_sequence(second); }, "removing it once more");
    check_throws<std::invalid_argument>([&] { run({{1, second}}, [] {}); }, "a token of a removed sequence");
    check(engine.sequence(0).length() == 130 && engine.sequence(third).length() == 90, "removing one changed another");
    check(engine.add_sequence() == second && engine.sequence(second).length() == 0, "a number is not used again");
    rows.clear();
    for (int i = 0; i < 130; ++i) rows.push_back({1, second});
    for (int i = 0; i < 40; ++i) rows.push_back({2, third});
    run(mixed(rows), [] {});
}

// Sequences that grow together, fork, fail, go back, are put aside and end, in any order and with room for a part of
// them: every logit is that of the same tokens alone, whatever kinds of layers a model has and however they keep their
// state.
void test_forks(const Model& model, KvType kv_type, int rounds) {
    constexpr int kSequences = 4, kPositions = kContext, kStep = 24;
    EngineOptions options{.threads = 2,
                          .sequences = kSequences,
                          .context = kContext,
                          .positions = kPositions,
                          .chunk = kStep,
                          .store = {.slots = 6},
                          .key_type = kv_type,
                          .value_type = kv_type,
                          .isa = ""};
    EngineOptions one = options;
    one.threads = one.sequences = 1;
    one.positions = 0;
    one.store.slots = kExperts * kLayerCount;
    Engine engine(model.spec, model.index, options), alone(model.spec, model.index, one);
    engine.remove_sequence(0);
    const int64_t all_free = engine.free_positions();
    check(all_free >= kPositions && all_free < kPositions + 64 * kSequences, "there is room for other positions");
    struct Text {
        int id;
        std::vector<int32_t> tokens;
    };
    std::vector<Text> texts;
    std::optional<std::pair<std::vector<std::byte>, std::vector<int32_t>>> saved;
    Random random(11);
    int full = 0, forks = 0, no_forks = 0, failures = 0;
    const auto expected = [&](const std::vector<int32_t>& tokens, std::span<const int32_t> wanted) {
        std::vector<int32_t> positions(tokens.size()), ids(tokens.size(), 0);
        std::iota(positions.begin(), positions.end(), 0);
        std::vector<float> result(wanted.size() * kVocabulary);
        alone.sequence(0).truncate(0);
        alone.forward({.tokens = tokens, .positions = positions, .sequences = ids, .wanted = wanted}, result.data(),
                      [] {});
        return result;
    };
    for (int round = 0; round < rounds; ++round) {
        const int action = pick(random, 0, 99);
        if (texts.empty() || (texts.size() < kSequences && action < 5)) {
            texts.push_back({engine.add_sequence(), {}});
            continue;
        }
        Text& text = texts[pick(random, 0, static_cast<int>(texts.size()) - 1)];
        SequenceState& state = engine.sequence(text.id);
        if (action < 60) {  // a pass, or two, of some of them
            std::vector<int32_t> batch, positions, ids, owners;
            const bool fails = pick(random, 0, 5) == 0;
            int layers = fails ? pick(random, 1, 2 * kLayerCount) : -1;
            std::vector<std::vector<int32_t>> after;
            for (const Text& each : texts) after.push_back(each.tokens);
            for (int row = 0, count = pick(random, 1, 3 * kStep); row < count; ++row) {
                const int owner = pick(random, 0, static_cast<int>(texts.size()) - 1);
                if (after[owner].size() == kContext) continue;
                positions.push_back(static_cast<int32_t>(after[owner].size()));
                after[owner].push_back(pick(random, 0, kVocabulary - 1));
                batch.push_back(after[owner].back());
                ids.push_back(texts[owner].id);
                owners.push_back(owner);
            }
            std::vector<int32_t> wanted(batch.size());
            std::iota(wanted.begin(), wanted.end(), 0);
            std::vector<float> logits(batch.size() * kVocabulary);
            const int64_t free = engine.free_positions();
            bool failed = false;
            try {
                engine.forward({.tokens = batch, .positions = positions, .sequences = ids, .wanted = wanted},
                               logits.data(), [&] {
                                   if (--layers == 0) throw std::runtime_error("given up");
                               });
            } catch (const StateError&) {
                check(engine.free_positions() == free, "a refused pass took blocks");
                for (const Text& each : texts)
                    check(engine.sequence(each.id).length() == static_cast<int>(each.tokens.size()),
                          "a refused pass changed a length");
                failed = true;
                ++full;
            } catch (const std::runtime_error&) {
                failed = true;
                ++failures;
            }
            for (size_t i = 0; i < texts.size(); ++i) {
                const size_t length = engine.sequence(texts[i].id).length();
                check(failed ? length >= texts[i].tokens.size() : length == after[i].size(),
                      "a pass left another length behind");
                after[i].resize(length);
                // What is wrong once stays wrong: a part of them is enough.
                if (!failed && length > texts[i].tokens.size() && pick(random, 0, 2) == 0) {
                    std::vector<int32_t> own;
                    for (size_t row = 0; row < owners.size(); ++row)
                        if (owners[row] == static_cast<int>(i)) own.push_back(positions[row]);
                    const std::vector<float> right = expected(after[i], own);
                    for (size_t row = 0, at = 0; row < owners.size(); ++row)
                        if (owners[row] == static_cast<int>(i))
                            check(std::memcmp(&right[kVocabulary * at++], &logits[kVocabulary * row],
                                              kVocabulary * sizeof(float)) == 0,
                                  "position " + std::to_string(positions[row]) + " in company, round " +
                                      std::to_string(round));
                }
                texts[i].tokens = after[i];
            }
        } else if (action < 75) {
            const int length = state.length(), at = pick(random, 0, 2)   ? length
                                                    : pick(random, 0, 1) ? state.marked()
                                                                         : pick(random, 0, length);
            try {
                const int id = engine.fork_sequence(text.id, at);
                texts.push_back({id, {text.tokens.begin(), text.tokens.begin() + at}});
                ++forks;
            } catch (const StateError&) {
                ++no_forks;
            }
        } else if (action < 83) {
            const int at = pick(random, 0, 1) ? state.marked() : pick(random, 0, state.length());
            try {
                state.truncate(at);
                text.tokens.resize(at);
            } catch (const StateError&) {
            }
        } else if (action < 89) {
            state.mark();
        } else if (action < 91) {
            saved.emplace(std::vector<std::byte>(state.snapshot_bytes()), text.tokens);
            state.snapshot(saved->first);
        } else if (action < 93 && saved) {
            try {
                state.restore(saved->first);
                text.tokens = saved->second;
            } catch (const StateError&) {
                text.tokens.clear();
            }
        } else {
            engine.remove_sequence(text.id);
            std::swap(text, texts.back());
            texts.pop_back();
        }
    }
    for (const int times : {full, forks, no_forks, failures})
        check(times > 0, "the rounds do not do what they are there for: " + std::to_string(full) + " refusals, " +
                             std::to_string(forks) + " forks, " + std::to_string(no_forks) + " impossible ones, " +
                             std::to_string(failures) + " failures");
    for (const Text& text : texts) engine.remove_sequence(text.id);
    check(engine.free_positions() == all_free, "blocks are lost");
}

// What is read ahead for the last layer is what the tokens with logits need, and nothing where there are none. The
// parts between the two routers add nothing to the stream here, so every prediction for such a token holds.
void test_predictions_for_the_last_layer() {
    constexpr int kCount = 20, kLast = kLayerCount - 1;
    Model model("f32", "f32", false);
    std::vector<uint32_t> silent{model.index.dense.at("layers." + std::to_string(kLast) + ".o").section};
    for (const auto& sections : model.index.experts.at(kLast - 1).sections) silent.push_back(sections[0]);
    for (const uint32_t number : silent) {
        Section& section = model.index.sections[number];
        const auto bytes = std::span(model.content).subspan(section.extents[0].offset, section.extents[0].length);
        std::ranges::fill(bytes, std::byte{0});
        section.checksum = crc32c(bytes);
    }
    model.file->write(model.content);
    const EngineOptions options{
        .threads = 2, .context = kContext, .chunk = kCount, .store = {.slots = kExperts + kTopK + 1}, .isa = ""};
    std::vector<int32_t> tokens(kCount), positions(kCount), ids(kCount, 0);
    std::iota(positions.begin(), positions.end(), 0);
    Random random(7);
    Aligned<float> last(kVocabulary);
    const auto prompt = [&](Engine& engine, std::span<const int32_t> wanted) {
        for (int32_t& token : tokens) token = pick(random, 0, kVocabulary - 1);
        engine.sequence(0).truncate(0);
        engine.forward({.tokens = tokens, .positions = positions, .sequences = ids, .wanted = wanted}, last.data(),
                       [] {});
        return engine.counters().store;
    };
    const int32_t wanted = kCount - 1;
    StoreCounters counters;
    {
        Engine engine(model.spec, model.index, options);
        for (int turn = 0; turn < 100; ++turn) counters = prompt(engine, {});
        check(counters.prefetch_issued == 0 && counters.sections_read <= kExperts,
              "experts of the last layer were read for tokens without logits");
    }
    Engine engine(model.spec, model.index, options);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    do {
        counters = prompt(engine, {&wanted, 1});
    } while (counters.prefetch_issued < 8 && std::chrono::steady_clock::now() < deadline);
    check(counters.prefetch_issued > 0, "nothing was read ahead");
    check(counters.prefetch_wasted == 0, "an expert of the last layer was read for a token without logits");
}

}  // namespace

void test_engine() {
    test_model(Model("f32", "f32", false), KvType::f32);
    test_model(Model("q4g64", "q4g64", false), KvType::f16);
    test_model(Model("ggml.q4_0", "ggml.q4_0", true), KvType::q8_0);
    test_damage();
    test_sequences();
    test_several_sequences();
    constexpr auto kFull = AttentionKind::full, kLatent = AttentionKind::mla, kDelta = AttentionKind::gated_delta,
                   kShort = AttentionKind::short_conv;
    const int rounds = 60;
    test_forks(Model("q4g64", "q4g64", false), KvType::f32, rounds);
    test_forks(Model("q4g64", "q4g64", false, {kFull, kLatent, kFull}), KvType::f16, rounds);
    test_forks(Model("q4g64", "q4g64", false, {kFull, kLatent, kFull}), KvType::q8_0, rounds);
    test_forks(Model("q4g64", "q4g64", false, {kFull, kDelta, kShort}), KvType::f16, rounds);
    test_forks(Model("q4g64", "q4g64", false, {kDelta, kShort, kFull}), KvType::q8_0, rounds);
    test_predictions_for_the_last_layer();
}

}  // namespace edgemoe::tests
