// edgemoe._core.profiling: routing metrics, cache simulation and the machine's speed. The Python side
// (edgemoe.profiling, edgemoe.machine) knows what the numbers mean; here sizes are checked and the GIL is given up.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "edgemoe/direct_file.h"
#include "edgemoe/machine_speed.h"
#include "edgemoe/routing_metrics.h"
#include "edgemoe/thread_pool.h"

namespace py = pybind11;

void bind_profiling(py::module_& module);

namespace {

using edgemoe::CachePolicy;
using edgemoe::Picks;
using edgemoe::PoolSimulator;
using edgemoe::WindowCounts;
using Counts = py::array_t<int64_t>;
using Offsets = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Items = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

constexpr int kMostExperts = 1 << 16;

void require(bool condition, const std::string& message) {
    if (!condition) throw py::value_error(message);
}

// A view of picks [tokens, k], uint8 or uint16, with any strides.
class PickArray {
  public:
    explicit PickArray(const py::array& array) {
        require(array.ndim() == 2, "picks must be [tokens, k], not of " + std::to_string(array.ndim()) + " dimensions");
        require(array.dtype().kind() == 'u' && array.itemsize() <= 2, "picks must be uint8 or uint16");
        data_ = static_cast<const std::byte*>(array.data());
        tokens_ = array.shape(0);
        k_ = array.shape(1);
        row_stride_ = array.strides(0);
        stride_ = array.strides(1);
        wide_ = array.itemsize() == 2;
        require(k_ >= 1 && k_ <= kMostExperts, "picks of " + std::to_string(k_) + " experts each");
    }

    int64_t tokens() const { return tokens_; }
    int k() const { return static_cast<int>(k_); }

    uint16_t at(int64_t token, int64_t pick) const {
        const std::byte* place = data_ + token * row_stride_ + pick * stride_;
        return wide_ ? *reinterpret_cast<const uint16_t*>(place) : static_cast<uint16_t>(*place);
    }

    void copy(int64_t begin, int64_t end, std::vector<uint16_t>& target) const {
        target.resize(size_t(end - begin) * k_);
        if (wide_)
            copy_as<uint16_t>(begin, end, target.data());
        else
            copy_as<uint8_t>(begin, end, target.data());
    }

  private:
    template <class Id>
    void copy_as(int64_t begin, int64_t end, uint16_t* out) const {
        for (int64_t token = begin; token < end; ++token) {
            const std::byte* place = data_ + token * row_stride_;
            for (int64_t pick = 0; pick < k_; ++pick, place += stride_) *out++ = *reinterpret_cast<const Id*>(place);
        }
    }

    const std::byte* data_;
    int64_t tokens_, k_, row_stride_, stride_;
    bool wide_;
};

struct Fault {
    int64_t token = -1;
    int pick = 0;
    int expert = 0;
    bool twice = false;
};

Fault find_fault(const PickArray& picks, int64_t begin, int64_t end, int experts) {
    std::vector<int64_t> seen(experts, -1);
    for (int64_t token = begin; token < end; ++token)
        for (int pick = 0; pick < picks.k(); ++pick) {
            const int expert = picks.at(token, pick);
            if (expert >= experts) return {token, pick, expert, false};
            if (seen[expert] == token) return {token, pick, expert, true};
            seen[expert] = token;
        }
    return {};
}

void require_experts(int experts) {
    require(experts >= 1 && experts <= kMostExperts, std::to_string(experts) + " experts are not between 1 and 65536");
}

void require_valid(const PickArray& picks, int experts) {
    require_experts(experts);
    const Fault fault = find_fault(picks, 0, picks.tokens(), experts);
    if (fault.token < 0) return;
    throw py::value_error("picks: token " + std::to_string(fault.token) + " has expert " +
                          std::to_string(fault.expert) +
                          (fault.twice ? " twice" : ", but there are " + std::to_string(experts)));
}

CachePolicy policy_of(const std::string& name) {
    // Experts touched in this pass leave last, the others by least recent use: within one layer (or wherever all of a
    // token's picks are judged before it) the touched ones are the most recently used, so this is LRU.
    if (name == "lru" || name == "least_stale") return CachePolicy::lru;
    if (name == "lfu") return CachePolicy::lfu;
    if (name == "sch_future") return CachePolicy::future;
    if (name == "belady") return CachePolicy::belady;
    throw py::value_error("policy '" + name + "' is not one of lru, lfu, least_stale, sch_future, belady");
}

Counts to_array(const std::vector<int64_t>& values) {
    return Counts(static_cast<py::ssize_t>(values.size()), values.data());
}

Counts to_array(const std::vector<int64_t>& values, size_t columns) {
    const auto width = static_cast<py::ssize_t>(columns);
    return Counts({static_cast<py::ssize_t>(values.size()) / width, width}, values.data());
}

// One sequence, one layer.

Counts hits(const py::array& array, int experts, const std::string& policy, int window) {
    const PickArray picks(array);
    require_valid(picks, experts);
    require(picks.tokens() < std::numeric_limits<int32_t>::max(), "too many tokens in one sequence");
    const CachePolicy chosen = policy_of(policy);
    require(chosen != CachePolicy::future || window >= 1, "sch_future needs a window m of at least 1");
    std::vector<int64_t> result(experts);
    {
        const py::gil_scoped_release release;
        std::vector<uint16_t> rows;
        picks.copy(0, picks.tokens(), rows);
        edgemoe::count_hits({rows.data(), static_cast<int>(picks.tokens()), picks.k(), experts}, chosen, window,
                            result);
        for (int c = 1; c < experts; ++c) result[c] += result[c - 1];
    }
    return to_array(result);
}

// Many sequences, one layer (or a model whose experts are numbered through). Every `every`-th sequence (none for 0) is
// a sample: its own figures are kept, and only on it `sampled_policies` and the caches that look ahead are run.

struct WindowResult {
    WindowCounts all;
    std::vector<int64_t> sampled_windows, sampled_totals, sampled_fixed;
};

py::dict curves(const py::array& array, int experts, const Offsets& starts, const std::vector<int>& lengths,
                const std::vector<std::string>& policies, const std::vector<std::string>& sampled_policies,
                const std::vector<int>& future_lengths, int every, bool by_expert) {
    const PickArray picks(array);
    require_experts(experts);
    require(every >= 0, "every = " + std::to_string(every) + " is negative");
    require(starts.size() >= 1 && starts.at(0) == 0 && starts.at(starts.size() - 1) == picks.tokens(),
            "the sequences must cover all tokens");
    const auto sequences = static_cast<int>(starts.size() - 1);
    for (int s = 0; s < sequences; ++s) {
        const int64_t tokens = starts.at(s + 1) - starts.at(s);
        require(tokens >= 1 && tokens < std::numeric_limits<int32_t>::max(),
                "sequence " + std::to_string(s) + " has " + std::to_string(tokens) + " tokens");
    }
    for (const int m : lengths) require(m >= 1 && m < 1 << 20, "a window of " + std::to_string(m) + " tokens");
    for (const int m : future_lengths) require(m >= 1, "a window of " + std::to_string(m) + " tokens");

    struct Job {
        std::string name;
        CachePolicy policy;
        int window;
        bool sampled_only;
        std::vector<int64_t> hits, sampled;
    };
    std::vector<Job> jobs;
    for (const std::string& name : policies) jobs.push_back({name, policy_of(name), 0, false, {}, {}});
    for (const std::string& name : sampled_policies) jobs.push_back({name, policy_of(name), 0, true, {}, {}});
    for (const int m : future_lengths)
        jobs.push_back({"sch_future_" + std::to_string(m), CachePolicy::future, m, true, {}, {}});

    std::vector<WindowResult> windows;
    for (const int m : lengths) windows.push_back({WindowCounts(experts, m, by_expert), {}, {}, {}});
    std::vector<int64_t> load(experts);
    Fault fault;
    {
        const py::gil_scoped_release release;
        for (Job& job : jobs) job.hits.resize(experts);
        const int64_t* start = starts.data();
        std::vector<uint16_t> rows;
        std::vector<int64_t> found(experts), before, after;
        for (int s = 0; s < sequences && fault.token < 0; ++s) {
            const bool sampled = every > 0 && s % every == 0;
            fault = find_fault(picks, start[s], start[s + 1], experts);
            if (fault.token >= 0) break;
            picks.copy(start[s], start[s + 1], rows);
            const Picks sequence{rows.data(), static_cast<int>(start[s + 1] - start[s]), picks.k(), experts};
            for (const uint16_t expert : rows) ++load[expert];

            for (WindowResult& window : windows) {
                if (!sampled) {
                    window.all.add(sequence);
                    continue;
                }
                // What the sequence adds is the difference it makes.
                const auto difference = [&](const auto& read, std::vector<int64_t>& target) {
                    after = read();
                    for (size_t i = 0; i < after.size(); ++i) target.push_back(after[i] - before[i]);
                };
                const int64_t count = window.all.windows();
                const std::vector<int64_t> totals = window.all.totals(), fixed = window.all.best_fixed();
                window.all.add(sequence);
                window.sampled_windows.push_back(window.all.windows() - count);
                before = totals;
                difference([&] { return window.all.totals(); }, window.sampled_totals);
                before = fixed;
                difference([&] { return window.all.best_fixed(); }, window.sampled_fixed);
            }
            for (Job& job : jobs) {
                if (job.sampled_only && !sampled) continue;
                std::fill(found.begin(), found.end(), 0);
                edgemoe::count_hits(sequence, job.policy, job.window, found);
                for (int c = 1; c < experts; ++c) found[c] += found[c - 1];
                for (int c = 0; c < experts; ++c) job.hits[c] += found[c];
                if (sampled) job.sampled.insert(job.sampled.end(), found.begin(), found.end());
            }
        }
    }
    if (fault.token >= 0)
        throw py::value_error("picks: token " + std::to_string(fault.token) + " has expert " +
                              std::to_string(fault.expert) +
                              (fault.twice ? " twice" : ", but there are " + std::to_string(experts)));

    py::dict result, window_results, policy_results;
    for (size_t i = 0; i < windows.size(); ++i) {
        const WindowResult& window = windows[i];
        py::dict one;
        one["windows"] = window.all.windows();
        const auto counts = window.all.by_expert();
        one["counts"] = to_array({counts.begin(), counts.end()}, lengths[i] + 1);
        one["fixed"] = to_array(window.all.best_fixed());
        one["sampled_windows"] = to_array(window.sampled_windows);
        one["sampled_totals"] = to_array(window.sampled_totals, lengths[i] + 1);
        one["sampled_fixed"] = to_array(window.sampled_fixed, experts);
        window_results[py::int_(lengths[i])] = one;
    }
    for (const Job& job : jobs) {
        py::dict one;
        one["hits"] = to_array(job.hits);
        one["sampled_hits"] = to_array(job.sampled, experts);
        policy_results[py::str(job.name)] = one;
    }
    result["load"] = to_array(load);
    result["windows"] = window_results;
    result["policies"] = policy_results;
    return result;
}

// The requests of the engine's forward passes: for each pass and layer the distinct experts, numbered through the
// model, those with most tokens first, among equals in the order of their first pick.
py::tuple engine_requests(const py::array& array, const std::vector<int>& ks, const std::vector<int>& experts,
                          const Offsets& passes) {
    const PickArray picks(array);
    require(ks.size() == experts.size() && !ks.empty(), "as many k as layers are needed");
    int64_t width = 0, total = 0;
    for (size_t layer = 0; layer < ks.size(); ++layer) {
        require_experts(experts[layer]);
        require(ks[layer] >= 1 && ks[layer] <= experts[layer], "k = " + std::to_string(ks[layer]));
        width += ks[layer];
        total += experts[layer];
    }
    require(width == picks.k(), "picks must be [tokens, sum of k]");
    require(total < std::numeric_limits<int32_t>::max(), "too many experts");
    int64_t covered = 0;
    for (py::ssize_t i = 0; i < passes.size(); ++i) {
        require(passes.at(i) >= 1, "a pass of " + std::to_string(passes.at(i)) + " tokens");
        covered += passes.at(i);
    }
    require(covered == picks.tokens(), "the passes must cover all tokens");

    std::vector<int32_t> items, layers;
    std::vector<int64_t> offsets{0};
    bool valid = true;
    {
        const py::gil_scoped_release release;
        items.reserve(static_cast<size_t>(picks.tokens() * width));
        std::vector<int32_t> count, active;
        int64_t token = 0;
        for (py::ssize_t pass = 0; pass < passes.size() && valid; ++pass) {
            const int64_t end = token + passes.data()[pass];
            int first_pick = 0;
            int32_t first_expert = 0;
            for (size_t layer = 0; layer < ks.size() && valid; ++layer) {
                count.assign(experts[layer], 0);
                active.clear();
                for (int64_t t = token; t < end; ++t)
                    for (int pick = 0; pick < ks[layer]; ++pick) {
                        const int expert = picks.at(t, first_pick + pick);
                        if (expert >= experts[layer]) {
                            valid = false;
                            break;
                        }
                        if (count[expert]++ == 0) active.push_back(expert);
                    }
                std::stable_sort(active.begin(), active.end(),
                                 [&](int32_t left, int32_t right) { return count[left] > count[right]; });
                for (const int32_t expert : active) items.push_back(first_expert + expert);
                offsets.push_back(static_cast<int64_t>(items.size()));
                layers.push_back(static_cast<int32_t>(layer));
                first_pick += ks[layer];
                first_expert += experts[layer];
            }
            token = end;
        }
    }
    require(valid, "picks: an expert beyond its layer's number of experts");
    return py::make_tuple(py::array_t<int32_t>(static_cast<py::ssize_t>(items.size()), items.data()), to_array(offsets),
                          py::array_t<int32_t>(static_cast<py::ssize_t>(layers.size()), layers.data()));
}

// Pools of several capacities that are asked for the same things, one after another.
class Pools {
  public:
    Pools(const Offsets& sizes, const Offsets& capacities, int groups) : groups_(groups) {
        require(groups >= 1, "at least one group is needed");
        require(sizes.size() < std::numeric_limits<int32_t>::max(), "too many items");
        const std::span<const int64_t> all(sizes.data(), static_cast<size_t>(sizes.size()));
        for (const int64_t size : all) require(size >= 1, "an item of size " + std::to_string(size));
        items_ = static_cast<int32_t>(all.size());
        for (py::ssize_t i = 0; i < capacities.size(); ++i) pools_.emplace_back(all, capacities.at(i));
        requested_.resize(groups);
        missed_.resize(pools_.size() * groups);
    }

    void request(const Items& items, const Offsets& offsets, const Items& groups, int threads) {
        require(
            offsets.size() == groups.size() + 1 && offsets.at(0) == 0 && offsets.at(offsets.size() - 1) == items.size(),
            "the offsets must cover all items");
        for (py::ssize_t i = 0; i < groups.size(); ++i) {
            require(offsets.at(i) <= offsets.at(i + 1), "the offsets must ascend");
            require(groups.at(i) >= 0 && groups.at(i) < groups_, "an unknown group");
            requested_[groups.at(i)] += offsets.at(i + 1) - offsets.at(i);
        }
        for (py::ssize_t i = 0; i < items.size(); ++i)
            require(items.at(i) >= 0 && items.at(i) < items_, "an unknown item");
        const py::gil_scoped_release release;
        const auto count = static_cast<int>(pools_.size());
        edgemoe::ThreadPool(std::min(threads, count)).run(count, [&](int pool) {
            for (py::ssize_t i = 0; i < groups.size(); ++i)
                pools_[pool].request(
                    {items.data() + offsets.data()[i], static_cast<size_t>(offsets.data()[i + 1] - offsets.data()[i])},
                    missed_[size_t(pool) * groups_ + groups.data()[i]]);
        });
    }

    py::dict counters() const {
        std::vector<int64_t> requested, hit, evictions, missed_size;
        for (const PoolSimulator& pool : pools_) {
            requested.push_back(pool.counters().requested);
            hit.push_back(pool.counters().hit);
            evictions.push_back(pool.counters().evictions);
            missed_size.push_back(pool.counters().missed_size);
        }
        py::dict result;
        result["requested"] = to_array(requested);
        result["hit"] = to_array(hit);
        result["evictions"] = to_array(evictions);
        result["missed_size"] = to_array(missed_size);
        result["requested_by_group"] = to_array(requested_);
        result["missed_by_group"] = to_array(missed_, groups_);
        return result;
    }

  private:
    int groups_;
    int32_t items_ = 0;
    std::vector<PoolSimulator> pools_;
    std::vector<int64_t> requested_, missed_;
};

py::tuple as_tuple(const edgemoe::Throughput& result) { return py::make_tuple(result.bytes, result.seconds); }

}  // namespace

void bind_profiling(py::module_& module) {
    py::module_ profiling = module.def_submodule("profiling", "Routing metrics, cache simulation, machine speed.");

    profiling.def(
        "check",
        [](const py::array& array, int experts) -> py::object {
            const PickArray picks(array);
            require_experts(experts);
            Fault fault;
            {
                const py::gil_scoped_release release;
                fault = find_fault(picks, 0, picks.tokens(), experts);
            }
            if (fault.token < 0) return py::none();
            return py::make_tuple(fault.token, fault.expert, fault.twice);
        },
        py::arg("picks"), py::arg("experts"));
    profiling.def("hits", &hits, py::arg("picks"), py::arg("experts"), py::arg("policy"), py::arg("window") = 0);
    profiling.def(
        "fixed",
        [](const py::array& array, int experts, int m) {
            const PickArray picks(array);
            require_valid(picks, experts);
            require(m >= 1 && m <= picks.tokens() && picks.tokens() < std::numeric_limits<int32_t>::max(),
                    "a window of " + std::to_string(m) + " tokens");
            WindowCounts counts(experts, m, false);
            {
                const py::gil_scoped_release release;
                std::vector<uint16_t> rows;
                picks.copy(0, picks.tokens(), rows);
                counts.add({rows.data(), static_cast<int>(picks.tokens()), picks.k(), experts});
            }
            return to_array(counts.best_fixed());
        },
        py::arg("picks"), py::arg("experts"), py::arg("m"));
    profiling.def("curves", &curves, py::arg("picks"), py::arg("experts"), py::arg("starts"), py::arg("lengths"),
                  py::arg("policies"), py::arg("sampled_policies"), py::arg("future_lengths"), py::arg("every"),
                  py::arg("by_expert"));
    profiling.def("engine_requests", &engine_requests, py::arg("picks"), py::arg("ks"), py::arg("experts"),
                  py::arg("passes"));
    py::class_<Pools>(profiling, "Pools")
        .def(py::init<const Offsets&, const Offsets&, int>(), py::arg("sizes"), py::arg("capacities"),
             py::arg("groups"))
        .def("request", &Pools::request, py::arg("items"), py::arg("offsets"), py::arg("groups"), py::arg("threads"))
        .def("counters", &Pools::counters);

    profiling.def(
        "memory_read_speed",
        [](size_t size, int threads, double seconds, int streams) {
            require(size >= 4096 && threads >= 1 && threads <= 1024 && streams >= 1 && streams <= 64,
                    "size, threads or streams out of range");
            edgemoe::Throughput result;
            {
                const py::gil_scoped_release release;
                result = edgemoe::memory_read_speed(size, threads, seconds, streams);
            }
            return as_tuple(result);
        },
        py::arg("size"), py::arg("threads"), py::arg("seconds"), py::arg("streams") = 1);
    profiling.def(
        "disk_read_speed",
        [](const std::string& path, size_t block, int depth, double seconds, uint64_t limit) {
            require(block >= edgemoe::kDiskBlock && block % edgemoe::kDiskBlock == 0 && block <= size_t(1) << 30 &&
                        depth >= 1 && depth <= 256,
                    "block or depth out of range");
            edgemoe::Throughput result;
            {
                const py::gil_scoped_release release;
                result = edgemoe::disk_read_speed(path, block, depth, seconds, limit);
            }
            return as_tuple(result);
        },
        py::arg("path"), py::arg("block"), py::arg("depth"), py::arg("seconds"), py::arg("limit"));
    profiling.def(
        "reads_directly", [](const std::string& path) { return edgemoe::DirectFile(path).direct(); }, py::arg("path"));
}
