// The checker: g++ -fsanitize=thread calls a hook before each load and store of a kernel, and this is what the hooks do.
//
// Global memory is an arena that kernels/checker.py copies the arguments into, with space between them; of each byte it keeps
// whether it may be touched and whether it holds something. Shared memory has the same, and of each 4 bytes the last
// writers and readers with the time of the access, counted in syncs: two threads are ordered when a __syncthreads, or a
// __syncwarp of both, lies between them. Global memory that the kernel may write is held to the same within a block, as far
// as a table of its latest accesses reaches. Each thread logs its accesses; when a warp converges, the k-th access of a line
// by all its lanes is one request of the warp, as the hardware sees it, whose 32-byte sectors and banks are counted.
namespace emu {

constexpr unsigned char VALID = 1, WRITTEN = 2, WRITABLE = 4;            // state of a byte; of an argument not const
constexpr size_t ARENA_BYTES = 1ull << 32;
constexpr unsigned STATIC_AT = 256 << 10, SHARED_BYTES = STATIC_AT + MAX_STATIC_SMEM;    // static lies behind dynamic
constexpr unsigned SITE_BITS = 21, CLOCK_BITS = 28, GLOBAL_CELLS = 1 << 14;

struct Arena { unsigned char *bytes, *state, *read, *written; };
static Arena arena;
static std::vector<std::pair<unsigned, Site>> total;     // of the last launch, by site
static uint64_t total_segment_moved[64];

enum Kind { READ, WRITE, ATOMIC };

namespace check {

static unsigned char* reserve(size_t n_bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    return (unsigned char*)mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
}

void start_launch(const Launch&) {
    total.clear();
    memset(total_segment_moved, 0, sizeof total_segment_moved);
}

void start_machine(Machine& m) {
    if (!m.cells) {
        m.smem_state = reserve(SHARED_BYTES + 64);
        m.cells = (Cell*)reserve(SHARED_BYTES / 4 * sizeof(Cell));
        m.global_cells = (GlobalCell*)reserve(GLOBAL_CELLS * sizeof(GlobalCell));
        m.sites = (Site*)reserve((2ull << SITE_BITS) * sizeof(Site));
    }
    memset(m.smem_state, 0, SHARED_BYTES);
    memset(m.segment_moved, 0, sizeof m.segment_moved);
}

void start_block(Machine& m) {
    memset(m.smem_state, VALID, m.launch->smem_bytes);
    memset(m.smem_state + STATIC_AT, VALID, m.launch->module->static_smem_bytes);
    if (m.clock >> (CLOCK_BITS - 1)) {
        memset(m.cells, 0, SHARED_BYTES / 4 * sizeof(Cell));
        memset(m.global_cells, 0, GLOBAL_CELLS * sizeof(GlobalCell));
        m.clock = 0;
    }
    m.block_sync = ++m.clock;
    for (Warp& warp : m.warps) {
        warp.last_sync = 0;
        memset(warp.pair_sync, 0, sizeof warp.pair_sync);
    }
}

void sync_block(Machine& m) {
    for (unsigned w = 0; 32 * w < m.n_threads; ++w) converge(m, m.warps[w]);
    m.block_sync = ++m.clock;
}

void sync_warp(Machine& m, Warp& warp, unsigned mask) {
    ++m.clock;
    if (mask == warp.lanes) warp.last_sync = m.clock;
    else
        for_lanes(mask, [&](unsigned i) { for_lanes(mask, [&](unsigned j) { warp.pair_sync[i][j] = m.clock; }); });
}

// One access as a cell remembers it: time 28 bits, thread 10, which of the 4 bytes 4, is atomic 1, site 21.
static uint64_t mark(const Machine& m, unsigned bytes, bool is_atomic, unsigned site) {
    return (uint64_t)m.clock << 36 | (uint64_t)m.self->index << 26 | (uint64_t)bytes << 22 | (uint64_t)is_atomic << 21
           | site;
}
static unsigned clock_of(uint64_t mark) { return (unsigned)(mark >> 36); }
static unsigned thread_of(uint64_t mark) { return (unsigned)(mark >> 26) & 1023; }
static unsigned bytes_of(uint64_t mark) { return (unsigned)(mark >> 22) & 15; }
static bool is_atomic(uint64_t mark) { return mark >> 21 & 1; }
static const void* pc_of(const Machine& m, unsigned site) {
    return (const void*)(m.launch->module->begin + ((size_t)(site & ((1u << SITE_BITS) - 1)) << 2));
}
static unsigned site_of(const Machine& m, const void* pc) {
    return (unsigned)(((size_t)pc - m.launch->module->begin) >> 2) & ((1u << SITE_BITS) - 1);
}

static bool is_ordered(const Machine& m, uint64_t before) {
    const unsigned clock = clock_of(before), thread = thread_of(before);
    const Fiber& me = *m.self;
    if (clock < m.block_sync || thread == me.index) return true;
    if (thread / 32 != me.index / 32) return false;
    return clock < me.warp->last_sync || clock < me.warp->pair_sync[thread % 32][me.lane];
}

[[gnu::noinline]] static void fail_race(const Machine& m, size_t address, Kind kind, unsigned site, uint64_t before,
                                        bool wrote) {
    static const char* const VERBS[] = {"reads", "writes", "updates"};
    const size_t in_static = address - (size_t)m.static_smem, in_smem = address - (size_t)m.smem;
    char place[64] = "{address}";
    if (in_static < m.launch->module->static_smem_bytes)
        snprintf(place, sizeof place, "byte %zu of static shared memory", in_static);
    else if (in_smem < MAX_SMEM)
        snprintf(place, sizeof place, "byte %zu of dynamic shared memory", in_smem);
    fail(pc_of(m, site), pc_of(m, before), address, "race: thread %u %s %s at {at}, thread %u %s it at {other}, with no barrier "
         "between them%s", m.self->index, VERBS[kind], place, thread_of(before), wrote ? "wrote" : "read",
         thread_of(before) / 32 == m.self->index / 32 ? " (lanes of a warp are ordered by __syncwarp alone)" : "");
}

// `bytes` of the 4 at `address` that the cell stands for.
static void touch_cell(Machine& m, Cell& cell, size_t address, unsigned bytes, Kind kind, unsigned site) {
    const uint64_t now = mark(m, bytes, kind == ATOMIC, site);
    for (uint64_t before : cell.write)
        if ((bytes_of(before) & bytes) && !is_ordered(m, before) && !(kind == ATOMIC && is_atomic(before)))
            fail_race(m, address + __builtin_ctz(bytes & bytes_of(before)), kind, site, before, true);
    if (kind == READ) {
        const uint64_t last = cell.read[0];
        if (thread_of(last) != m.self->index && clock_of(last) >= m.block_sync
            && (thread_of(last) / 32 != m.self->index / 32 || clock_of(cell.read[1]) < m.block_sync))
            cell.read[1] = last;                         // two readers, of two warps where there are
        cell.read[0] = now;
        return;
    }
    for (uint64_t before : cell.read)
        if ((bytes_of(before) & bytes) && !is_ordered(m, before))
            fail_race(m, address + __builtin_ctz(bytes & bytes_of(before)), kind, site, before, false);
    if (bytes_of(cell.write[0]) & ~bytes) cell.write[1] = cell.write[0];
    cell.write[0] = now;
}

// Calls f(first byte of 4, which of them) for the groups of 4 bytes that an access touches.
template <class F> static void for_granules(size_t at, unsigned n_bytes, F f) {
    for (const size_t end = at + n_bytes; at < end;) {
        const size_t granule = at & ~(size_t)3, next = granule + 4 < end ? granule + 4 : end;
        f(granule, ((1u << (next - at)) - 1) << (at - granule));
        at = next;
    }
}

static void touch_shared(Machine& m, size_t a, unsigned offset, unsigned n_bytes, Kind kind, unsigned site) {
    for_granules(offset, n_bytes, [&](size_t granule, unsigned bytes) {
        touch_cell(m, m.cells[granule / 4], a + (granule - offset), bytes, kind, site);
    });
}

static void touch_global(Machine& m, size_t offset, unsigned n_bytes, Kind kind, unsigned site) {
    for_granules(offset, n_bytes, [&](size_t granule, unsigned bytes) {
        GlobalCell& its = m.global_cells[granule / 4 % GLOBAL_CELLS];
        if (its.granule != granule) its = {granule, {}};
        touch_cell(m, its.cell, (size_t)arena.bytes + granule, bytes, kind, site);
    });
}

// What a logged access was: site 21 bits, log2 of its size 3, in shared memory 1, a write 1; then its offset 32.
static void note(Machine& m, unsigned site, unsigned n_bytes, bool is_shared, bool is_write, unsigned offset) {
    Fiber& me = *m.self;
    if (me.n_log == me.log_capacity) {
        m.holds_heap = true;
        me.log_capacity = me.log_capacity ? 2 * me.log_capacity : 256;
        me.log = (uint64_t*)realloc(me.log, me.log_capacity * sizeof(uint64_t));
        m.holds_heap = false;
    }
    const unsigned head = site | (unsigned)__builtin_ctz(n_bytes) << SITE_BITS | (unsigned)is_shared << 24
                          | (unsigned)is_write << 25;
    me.log[me.n_log++] = (uint64_t)head << 32 | offset;
}

// Whether each of n_bytes bytes has all the bits of `bits`.
static bool has_all(const unsigned char* state, unsigned n_bytes, unsigned char bits) {
    const uint64_t all = bits * 0x0101010101010101ull;
    uint64_t some = 0;
    switch (n_bytes) {
        case 1: return (*state & bits) == bits;
        case 2: { uint16_t x; memcpy(&x, state, 2); return (uint16_t)(x & all) == (uint16_t)all; }
        case 4: { uint32_t x; memcpy(&x, state, 4); return (uint32_t)(x & all) == (uint32_t)all; }
        case 8: memcpy(&some, state, 8); return (some & all) == all;
        default: {
            uint64_t rest;
            memcpy(&some, state, 8);
            memcpy(&rest, state + 8, 8);
            return (some & rest & all) == all;
        }
    }
}

[[gnu::noinline]] static void fail_access(const Machine& m, size_t a, unsigned n_bytes, Kind kind, const void* pc) {
    const char* verb = kind == READ ? "reads" : kind == WRITE ? "writes" : "updates";
    const size_t in_stacks = a - (size_t)m.stacks, in_smem = a - (size_t)m.smem, in_static = a - (size_t)m.static_smem;
    if (in_stacks < (size_t)MAX_THREADS * STACK_BYTES)
        fail(pc, nullptr, a, "out of bounds: thread %u %s %u bytes of the local memory of thread %u at {at}", m.self->index,
             verb, n_bytes, (unsigned)(in_stacks / STACK_BYTES));
    if (in_static < m.launch->module->static_smem_bytes + 4096)
        fail(pc, nullptr, a, "out of bounds: thread %u %s %u bytes at byte %zu of %zu bytes of static shared memory at {at}",
             m.self->index, verb, n_bytes, in_static, m.launch->module->static_smem_bytes);
    if (in_smem < MAX_SMEM + 4096)
        fail(pc, nullptr, a, "out of bounds: thread %u %s %u bytes at byte %zu of %zu bytes of dynamic shared memory at {at}",
             m.self->index, verb, n_bytes, in_smem, (size_t)m.launch->smem_bytes);
    fail(pc, nullptr, a, "out of bounds: thread %u %s %u bytes at {at}: {address}", m.self->index, verb, n_bytes);
}

[[gnu::noinline]] static void fail_unwritten(const Machine& m, size_t a, unsigned n_bytes, const void* pc, bool is_shared) {
    const size_t in_static = a - (size_t)m.static_smem;
    const bool is_static = in_static < m.launch->module->static_smem_bytes;
    if (!is_shared)
        fail(pc, nullptr, a, "never written: thread %u reads %u bytes at {at} that hold nothing yet: {address}",
             m.self->index, n_bytes);
    fail(pc, nullptr, a, "never written: thread %u reads %u bytes at {at} that hold nothing yet, or a copy_async not waited "
         "for: byte %zu of %s shared memory", m.self->index, n_bytes, is_static ? in_static : a - (size_t)m.smem,
         is_static ? "static" : "dynamic");
}

[[gnu::noinline]] static void fail_misaligned(const Machine& m, size_t a, unsigned n_bytes, unsigned alignment,
                                              const void* pc) {
    fail(pc, nullptr, a, "misaligned: thread %u accesses %u bytes at {at}; {address} is not at a multiple of %u",
         m.self->index, n_bytes, alignment);
}

// A struct that is copied whole has padding, which nobody writes: some byte of each 8 is enough.
static bool holds_something(const unsigned char* state, unsigned n_bytes) {
    for (unsigned i = 0; i < n_bytes; i += 8) {
        uint64_t some = 0;
        memcpy(&some, state + i, n_bytes - i < 8 ? n_bytes - i : 8);
        if (!(some & WRITTEN * 0x0101010101010101ull)) return false;
    }
    return true;
}

// A load or store of n_bytes, 1, 2, 4, 8 or 16, at a multiple of `alignment`; `is_struct` when it may hold padding.
template <Kind kind, bool is_struct = false, bool is_noted = true>
inline __attribute__((always_inline)) void on_access(size_t a, unsigned n_bytes, unsigned alignment, const void* pc) {
    Machine& m = *machine;
    m.last_pc = pc;
    if (a - m.stack < STACK_BYTES) return;
    size_t offset = a - (size_t)arena.bytes;
    if (offset < ARENA_BYTES) {
        if (a & (alignment - 1)) fail_misaligned(m, a, n_bytes, alignment, pc);
        unsigned char* state = arena.state + offset;
        if (!has_all(state, n_bytes, VALID)) fail_access(m, a, n_bytes, kind, pc);
        if (kind != WRITE && !(is_struct ? holds_something(state, n_bytes) : has_all(state, n_bytes, WRITTEN)))
            fail_unwritten(m, a, n_bytes, pc, false);
        if (kind != READ) memset(state, VALID | WRITTEN | WRITABLE, n_bytes);
        if (*state & WRITABLE) touch_global(m, offset, n_bytes, kind, site_of(m, pc));
        if (kind != WRITE && is_noted) note(m, site_of(m, pc), n_bytes, false, false, (unsigned)offset);
        if (kind != READ && is_noted) note(m, site_of(m, pc), n_bytes, false, true, (unsigned)offset);
        return;
    }
    offset = a - (size_t)m.smem;
    if (offset >= MAX_SMEM) {
        offset = a - (size_t)m.static_smem + STATIC_AT;
        if (offset < STATIC_AT || offset >= STATIC_AT + m.launch->module->static_smem_bytes) {
            if (kind == READ && a >= m.launch->module->begin && a < m.launch->module->end) return;      // a constant
            fail_access(m, a, n_bytes, kind, pc);
        }
    }
    if (a & (alignment - 1)) fail_misaligned(m, a, n_bytes, alignment, pc);
    unsigned char* state = m.smem_state + offset;
    if (!has_all(state, n_bytes, VALID)) fail_access(m, a, n_bytes, kind, pc);
    if (kind != WRITE && !(is_struct ? holds_something(state, n_bytes) : has_all(state, n_bytes, WRITTEN)))
        fail_unwritten(m, a, n_bytes, pc, true);
    if (kind != READ) memset(state, VALID | WRITTEN, n_bytes);
    touch_shared(m, a, (unsigned)offset, n_bytes, kind, site_of(m, pc));
    if (is_noted) note(m, site_of(m, pc), n_bytes, true, kind != READ, (unsigned)offset);
}

void access(const void* p, unsigned n_bytes, bool is_write, const void* pc) {
    if (is_write) on_access<WRITE>((size_t)p, n_bytes, n_bytes, pc);
    else on_access<READ>((size_t)p, n_bytes, n_bytes, pc);
}

static unsigned shared_offset(const Machine& m, const void* p) {
    const size_t offset = (size_t)p - (size_t)m.smem;
    return (unsigned)(offset < MAX_SMEM ? offset : (size_t)p - (size_t)m.static_smem + STATIC_AT);
}

void forget(void* p, unsigned n_bytes) { memset(machine->smem_state + shared_offset(*machine, p), VALID, n_bytes); }

void land(void* p, unsigned n_bytes, const void* pc) {
    Machine& m = *machine;
    const unsigned offset = shared_offset(m, p);
    touch_shared(m, (size_t)p, offset, n_bytes, WRITE, site_of(m, pc));
    memset(m.smem_state + offset, VALID | WRITTEN, n_bytes);
}

// One request of a warp: `n` accesses of the same line, in lane order.
struct Request { unsigned head, n, lanes[32], offsets[32]; };

static unsigned n_sectors(const Request& r, unsigned n_bytes) {
    unsigned sectors[64], n = 0, count = 1;
    bool is_sorted = true;
    for (unsigned i = 0; i < r.n; ++i)
        for (unsigned s = r.offsets[i] / 32; s <= (r.offsets[i] + n_bytes - 1) / 32; ++s) {
            is_sorted &= n == 0 || sectors[n - 1] <= s;
            sectors[n++] = s;
        }
    if (!is_sorted) std::sort(sectors, sectors + n);
    for (unsigned i = 1; i < n; ++i) count += sectors[i] != sectors[i - 1];
    return count;
}

// Wavefronts beyond the first: shared memory serves one 4-byte word of each of 32 banks at a time, 8-byte accesses half a
// warp at a time and 16-byte ones a quarter.
static unsigned n_extra_wavefronts(const Request& r, unsigned n_bytes) {
    const unsigned n_words = n_bytes > 4 ? n_bytes / 4 : 1, lanes_at_once = 32 / n_words;
    unsigned extra = 0;
    for (unsigned i = 0; i < r.n;) {
        unsigned words[32], n = 0, count[32] = {}, most = 1;
        const unsigned phase = r.lanes[i] / lanes_at_once;
        for (; i < r.n && r.lanes[i] / lanes_at_once == phase; ++i)
            for (unsigned w = 0; w < n_words; ++w) words[n++] = r.offsets[i] / 4 + w;
        bool is_row = true;
        for (unsigned j = 1; j < n; ++j) is_row &= words[j] == words[0] + j;
        if (is_row) continue;
        std::sort(words, words + n);
        for (unsigned j = 0; j < n; ++j)
            if (j == 0 || words[j] != words[j - 1]) most = std::max(most, ++count[words[j] % 32]);
        extra += most - 1;
    }
    return extra;
}

static void account(Machine& m, const Request& r) {
    const unsigned n_bytes = 1u << (r.head >> SITE_BITS & 7);
    const bool is_shared = r.head >> 24 & 1, is_write = r.head >> 25 & 1;
    const unsigned index = (r.head & ((1u << SITE_BITS) - 1)) * 2 + is_shared;
    Site& site = m.sites[index];
    if (site.n_requests++ == 0) m.touched_sites.push_back(index);
    site.n_bytes += r.n * n_bytes;
    if (is_shared) {
        site.n_extra_wavefronts += n_extra_wavefronts(r, n_bytes);
        return;
    }
    unsigned char* touched = is_write ? arena.written : arena.read;
    bool is_row = true;
    for (unsigned i = 1; i < r.n; ++i) is_row &= r.offsets[i] == r.offsets[0] + i * n_bytes;
    unsigned moved;
    if (is_row) {
        const unsigned end = r.offsets[0] + r.n * n_bytes;
        memset(touched + r.offsets[0], 1, end - r.offsets[0]);
        moved = 32 * ((end - 1) / 32 - r.offsets[0] / 32 + 1);
    } else {
        for (unsigned i = 0; i < r.n; ++i) memset(touched + r.offsets[i], 1, n_bytes);
        moved = 32 * n_sectors(r, n_bytes);
    }
    site.moved_bytes += moved;
    if (is_write) return;
    for (unsigned s = 0; s < m.launch->n_segments && s < 64; ++s)
        if (r.offsets[0] < m.launch->segments[s].end) {
            m.segment_moved[s] += moved;
            break;
        }
}

void converge(Machine& m, Warp& warp) {
    Fiber* lanes = &m.fibers[32 * (&warp - m.warps)];
    const unsigned n_lanes = __builtin_popcount(warp.lanes);
    unsigned longest = 0;
    for (unsigned l = 0; l < n_lanes; ++l) longest = std::max(longest, lanes[l].n_log);
    if (!longest) return;
    m.holds_heap = true;
    Request r;
    unsigned i = 0;
    for (bool is_alike = true; i < lanes[0].n_log; ++i) {            // while all lanes did the same
        r.head = (unsigned)(lanes[0].log[i] >> 32);
        r.n = n_lanes;
        for (unsigned l = 0; l < n_lanes && is_alike; ++l) {
            is_alike = i < lanes[l].n_log && lanes[l].log[i] >> 32 == r.head;
            r.lanes[l] = l;
            r.offsets[l] = is_alike ? (unsigned)lanes[l].log[i] : 0;
        }
        if (!is_alike) break;
        account(m, r);
    }
    if (i < longest) {                                               // after that, the k-th time of each line is a request
        struct Entry { unsigned head, k, lane, offset; };
        static thread_local std::vector<Entry> entries;
        entries.clear();
        for (unsigned l = 0; l < n_lanes; ++l) {
            const size_t first = entries.size();
            for (unsigned j = i; j < lanes[l].n_log; ++j)
                entries.push_back({(unsigned)(lanes[l].log[j] >> 32), j, l, (unsigned)lanes[l].log[j]});
            std::sort(entries.begin() + first, entries.end(), [](const Entry& a, const Entry& b) {
                return a.head != b.head ? a.head < b.head : a.k < b.k; });
            unsigned k = 0;
            for (size_t e = first; e < entries.size(); ++e) {
                k = e > first && entries[e].head == entries[e - 1].head ? k + 1 : 0;
                entries[e].k = k;
            }
        }
        std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
            return a.head != b.head ? a.head < b.head : a.k != b.k ? a.k < b.k : a.lane < b.lane; });
        r.n = 0;
        for (const Entry& e : entries) {
            static thread_local unsigned k;
            if (r.n && (e.head != r.head || e.k != k)) {
                account(m, r);
                r.n = 0;
            }
            r.head = e.head;
            k = e.k;
            r.lanes[r.n] = e.lane;
            r.offsets[r.n++] = e.offset;
        }
        account(m, r);
    }
    for (unsigned l = 0; l < n_lanes; ++l) lanes[l].n_log = 0;
    m.holds_heap = false;
}

void end_machine(Machine& m) {
    for (unsigned index : m.touched_sites) {
        total.push_back({index, m.sites[index]});
        m.sites[index] = {};
    }
    m.touched_sites.clear();
    for (unsigned s = 0; s < 64; ++s) total_segment_moved[s] += m.segment_moved[s];
}

}  // namespace check
}  // namespace emu

// Where host.py lays the arguments out: the arena, and for each of its bytes the state, "was read", "was written".
extern "C" void emu_arena(emu::Arena* out) {
    if (!emu::arena.bytes)
        emu::arena = {emu::check::reserve(emu::ARENA_BYTES), emu::check::reserve(emu::ARENA_BYTES),
                      emu::check::reserve(emu::ARENA_BYTES), emu::check::reserve(emu::ARENA_BYTES)};
    *out = emu::arena;
}

// Traffic of the last checked launch: per segment, and per line (address and Site, twice as many rows as lines at most).
extern "C" size_t emu_traffic(uint64_t* segment_moved, uint64_t* rows, size_t n_rows) {
    using namespace emu;
    memcpy(segment_moved, total_segment_moved, sizeof total_segment_moved);
    for (size_t i = 0; i < total.size() && i < n_rows; ++i) {
        const Site& s = total[i].second;
        const uint64_t row[6] = {(uint64_t)(total[i].first / 2) << 2, total[i].first % 2, s.n_requests, s.n_bytes,
                                 s.moved_bytes, s.n_extra_wavefronts};
        memcpy(rows + 6 * i, row, sizeof row);
    }
    return total.size();
}

#include "hooks.cpp"
