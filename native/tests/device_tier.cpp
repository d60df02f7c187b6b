// Which misses a device takes, which experts lie in its memory, and that a device which has failed stays so.
#include "store/device_tier.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/device/fail_stop.h"
#include "check.h"

namespace edgemoe::tests {
namespace {

MissRule rule_of(double host, double link) {
    MissRule rule;
    rule.host_took(static_cast<size_t>(host * 1e9), 1.0);
    rule.link_took(static_cast<size_t>(link * 1e9), 1.0);
    return rule;
}

void test_decisions() {
    check(MissRule().moved(8) == 0, "experts are moved without any figure");
    MissRule half;
    half.link_took(1 << 30, 0.1);
    check(half.moved(8) == 0, "experts are moved without a figure of the host");
    // A slow link never moves an expert within a step; with enough misses it would carry one of many.
    for (int misses = 0; misses <= 8; ++misses)
        check(rule_of(20, 1).moved(misses) == 0, "a link of 1 GB/s moves one of " + std::to_string(misses));
    check(rule_of(20, 1).moved(42) == 2, "a link of 1 GB/s does not carry its part of many");
    int all = 0;
    MissRule fast = rule_of(10, 1000);
    for (int i = 0; i < 64; ++i) all += fast.moved(4) == 4;
    check(all > 50 && all < 64, "the host's figure is never taken again");
    // One as fast as the host takes half of them; a fast one takes more, and not all.
    check(rule_of(10, 10).moved(8) == 4, "an equal link does not take half");
    check(rule_of(10, 10).moved(1) == 0, "a single miss is moved for nothing");
    check(rule_of(10, 30).moved(8) == 6, "a fast link does not take its part");
    check(rule_of(10, 25).moved(1) == 1, "a single miss is not moved although the link is faster");
    for (int misses = 0; misses <= 64; ++misses)
        for (const double link : {0.1, 1.0, 3.0, 10.0, 12.0, 50.0, 1000.0}) {
            const int moved = rule_of(10, link).moved(misses);
            const auto longest = [&](int n) { return std::max(n / link, (misses - n) / 10.0); };
            check(moved >= 0 && moved <= misses, "more are moved than there are");
            for (int other = 0; other <= misses; ++other)
                check(longest(moved) <= longest(other) * (1 + 1e-9), "another number would be done sooner");
        }
}

void test_figures_converge() {
    MissRule rule = rule_of(10, 20);
    for (int i = 0; i < 30; ++i) rule.link_took(size_t{1} << 30, 1.0);
    check(rule.link_rate() < 1.2e9, "a link that became slow is still believed fast");
    check(rule.moved(8) == 0, "a link that became slow still moves experts");
    // What had arrived before anybody looked says only that the link is no slower.
    rule.link_took_at_most(size_t{1} << 30, 100.0);
    check(rule.link_rate() > 1e9, "a late look made the link slower");
    for (int i = 0; i < 30; ++i) rule.link_took_at_most(size_t{1} << 30, 0.05);
    check(rule.link_rate() > 20e9 && rule.moved(8) > 4, "a link that became fast is still believed slow");
    rule.host_took(0, 1.0);
    rule.host_took(1 << 20, 0.0);
    check(rule.host_rate() == 1e10, "measurements of nothing count");
}

// A device that keeps bytes in the host's memory, and whose uploads arrive when the test says so.
class SlowLink final : public Device {
  public:
    DeviceFacts facts() const override { return {.name = "slow link"}; }
    std::byte* allocate(size_t bytes) override {
        if (fails) throw DeviceMemoryError("no room");
        return memory_.allocate(bytes);
    }
    void release(std::byte* /*memory*/) override {}
    void launch(Kernel /*kernel*/, int /*groups*/, std::span<const Argument> /*arguments*/) override {
        if (fails) throw DeviceError("a launch failed");
    }
    void write(std::byte* to, std::span<const std::byte> from) override { memory_.write(to, from); }
    void copy(std::byte* to, const std::byte* from, size_t bytes) override { memory_.copy(to, from, bytes); }
    void read(std::span<std::byte> to, const std::byte* from) override { memory_.read(to, from); }
    void wait() override {}
    uint64_t upload(std::byte* to, std::span<const std::byte> from) override {
        pending.push_back({to, from});
        return ++last_;
    }
    bool done(uint64_t upload) override { return upload <= arrived; }
    void wait(uint64_t upload) override {
        while (arrived < upload) arrive();
    }
    void arrive() {
        const auto& [to, from] = pending[arrived++];
        memory_.write(to, from);
    }

    std::vector<std::pair<std::byte*, std::span<const std::byte>>> pending;
    uint64_t arrived = 0;
    bool fails = false;

  private:
    HostMemory memory_;
    uint64_t last_ = 0;
};

constexpr int kExperts = 6, kRows = 16, kCols = 64;

ExpertLayer layer_of() {
    ExpertLayer layer;
    layer.levels.resize(2);
    for (int level = 0; level < 2; ++level)
        for (ExpertPart& part : layer.levels[level].parts) {
            part.stored = stored_layout(level == 0 ? "base2r1" : "refine2");
            part.rows = kRows;
            part.cols = kCols;
        }
    layer.sections.resize(kExperts);
    return layer;
}

void test_what_lies_where() {
    const ExpertLayer layer = layer_of();
    const auto sizes = expert_bytes(layer);
    SlowLink device;
    HostMemory memory;
    DeviceTier tier(device, memory, {&layer}, 2);
    check(tier.counters().uploads == 0, "measuring the link counts as an upload");
    // Bytes that say whose they are.
    std::vector<std::vector<std::byte>> bytes;
    const auto host = [&](int expert) {
        ExpertParts parts{};
        for (int level = 0; level < 2; ++level)
            for (int part = 0; part < 3; ++part) {
                bytes.emplace_back(sizes[level][part], static_cast<std::byte>(expert * 6 + level * 3 + part));
                parts[part][level] = bytes.back().data();
            }
        return parts;
    };
    const auto check_parts = [&](const ExpertParts& parts, int expert, int levels) {
        for (int level = 0; level < levels; ++level)
            for (int part = 0; part < 3; ++part)
                for (size_t i = 0; i < sizes[level][part]; ++i)
                    check(parts[part][level][i] == static_cast<std::byte>(expert * 6 + level * 3 + part),
                          "other bytes than were uploaded");
    };
    const auto use = [&](int expert, int level) {
        tier.begin_turn();
        const auto found = tier.find(0, expert, level);
        if (!found) tier.offer(0, expert, level, host(expert));
        return found;
    };

    check(!use(0, 0), "something lies there from the beginning");
    check(!use(0, 0), "what is under way is taken for present");
    check(device.pending.size() == 3, "what is under way is uploaded again");  // two measured the link
    device.arrive();
    const auto first = use(0, 0);
    check(first.has_value(), "what has arrived is not found");
    check_parts(*first, 0, 1);
    check(!use(0, 1), "a level is found that was not uploaded");
    device.arrive();
    const auto both = use(0, 1);
    check(both.has_value(), "the second level did not come");
    check_parts(*both, 0, 2);
    // The second slot fills at the first use; then there is no empty one.
    use(1, 0);
    device.arrive();
    check(use(1, 0).has_value(), "an empty slot was not used");
    // Who comes once does not push out what is used all the time.
    use(0, 0);
    use(1, 0);
    const size_t before = device.pending.size();
    use(2, 0);
    use(0, 0);
    use(1, 0);
    check(device.pending.size() == before, "an expert that came once pushed another one out");
    // Who was used after another one's last use takes its place.
    use(2, 0);
    use(1, 0);
    use(2, 0);
    check(device.pending.size() == before + 1, "an expert that is used again does not come");
    device.arrive();
    check(!tier.has(0, 0, 0) && tier.has(0, 1, 0) && use(2, 0), "the wrong expert made room");
    // What this turn works with stays.
    tier.begin_turn();
    check(tier.find(0, 1, 0) && tier.find(0, 2, 0), "experts went by themselves");
    tier.find(0, 3, 0);
    check(!tier.bring(0, 3, 0, host(3)), "a slot at work is overwritten");
    tier.begin_turn();
    tier.find(0, 2, 0);
    tier.find(0, 3, 0);
    check(!tier.bring(0, 3, 0, host(3)), "one that was used as long ago gives way");
    tier.begin_turn();
    tier.find(0, 2, 0);
    tier.find(0, 3, 0);
    const auto brought = tier.bring(0, 3, 0, host(3));
    check(brought.has_value() && !tier.has(0, 1, 0), "nothing can be brought although a slot is idle");
    tier.wait();
    check(tier.has(0, 3, 0), "what was brought and waited for is not there");
    check_parts(*brought, 3, 1);
}

void test_failures_last() {
    const auto slow = std::make_shared<SlowLink>();
    FailStop device(slow);
    slow->fails = true;
    check_throws<DeviceMemoryError>([&] { device.allocate(1); }, "an allocation without room");
    slow->fails = false;
    check(device.allocate(1) != nullptr, "a lack of room is taken for a failure");
    slow->fails = true;
    const auto launch = [&] { static_cast<Device&>(device).launch(Kernel::rms_norm, 1); };
    check_throws<DeviceError>(launch, "a launch that fails");
    slow->fails = false;
    check_throws<DeviceError>(launch, "a launch after a failure");
    check_throws<DeviceError>([&] { device.wait(); }, "waiting after a failure");
    check_throws<DeviceError>([&] { device.allocate(1); }, "an allocation after a failure");
}

}  // namespace

void test_device_tier() {
    test_failures_last();
    test_decisions();
    test_figures_converge();
    test_what_lies_where();
}

}  // namespace edgemoe::tests
