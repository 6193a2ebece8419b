// What the lanes of a warp do together: each leaves its arguments and parks; the last to come does the work for all. And
// the copies to shared memory that land later. A part of runtime.cpp.
namespace emu {

static const char* const OP_NAMES[] = {"__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                                       "__ballot_sync", "__any_sync", "__all_sync", "mma_bf16", "load_matrix",
                                       "load_matrix_trans"};

// Parks this lane until all lanes of `mask` are in the same collective. True in the lane that comes last: it does the
// work for all of them, from warp.args, and calls release().
static bool join(Machine& m, unsigned& mask, Op op, void* args, const char* file, int line) {
    Fiber& me = *m.self;
    Warp& warp = *me.warp;
    mask &= warp.lanes;
    if (!(mask >> me.lane & 1))
        fail(nullptr, nullptr, 0, "thread %u (lane %u) calls %s (%s:%d) with mask 0x%x, which leaves it out", me.index,
             me.lane, OP_NAMES[op], file, line, mask);
    if (mask & warp.done)
        fail(nullptr, nullptr, 0, "thread %u waits in %s (%s:%d) for thread %u, which has returned", me.index, OP_NAMES[op],
             file, line, me.index - me.lane + __builtin_ctz(mask & warp.done));
    Group& group = warp.groups[__builtin_ctz(mask)];
    if (group.n_arrived && (group.op != op || group.mask != mask))
        fail(nullptr, nullptr, 0, "thread %u is in %s with mask 0x%x (%s:%d) while other lanes wait in %s with mask 0x%x",
             me.index, OP_NAMES[op], mask, file, line, OP_NAMES[group.op], group.mask);
    group.op = op;
    group.mask = mask;
    warp.args[me.lane] = args;
    if (++group.n_arrived == (unsigned)__builtin_popcount(mask)) {
        if (m.is_checked && mask == warp.lanes) check::converge(m, warp);
        return true;
    }
    wait_in(m, OP_NAMES[op], file, line);
    return false;
}

template <class F> static void for_lanes(unsigned mask, F f) {
    for (unsigned left = mask; left; left &= left - 1) f(__builtin_ctz(left));
}

static void release(Machine& m, unsigned mask) {
    Fiber& me = *m.self;
    me.warp->groups[__builtin_ctz(mask)].n_arrived = 0;
    for_lanes(mask & ~(1u << me.lane), [&](unsigned lane) { push(m, me.index - me.lane + lane); });
}

void sync_warp(unsigned mask, const char* file, int line) {
    Machine& m = *machine;
    if (!join(m, mask, SYNCWARP, nullptr, file, line)) return;
    if (m.is_checked) check::sync_warp(m, *m.self->warp, mask);
    release(m, mask);
}

uint64_t shuffle(unsigned mask, uint64_t bits, unsigned source, Op op, const char* file, int line) {
    struct Args { uint64_t value, result; unsigned source; } args{bits, 0, source};
    Machine& m = *machine;
    if (!join(m, mask, op, &args, file, line)) return args.result;
    void* const* all = m.self->warp->args;
    for_lanes(mask, [&](unsigned lane) {
        Args& its = *(Args*)all[lane];
        if (!(mask >> its.source & 1))
            fail(nullptr, nullptr, 0, "thread %u reads lane %u in %s (%s:%d), which takes no part (mask 0x%x)",
                 m.self->index - m.self->lane + lane, its.source, OP_NAMES[op], file, line, mask);
        its.result = ((Args*)all[its.source])->value;
    });
    release(m, mask);
    return args.result;
}

unsigned vote(unsigned mask, bool predicate, Op op, const char* file, int line) {
    struct Args { unsigned bits; } args{predicate};
    Machine& m = *machine;
    if (!join(m, mask, op, &args, file, line)) return args.bits;
    void* const* all = m.self->warp->args;
    unsigned bits = 0;
    for_lanes(mask, [&](unsigned lane) { bits |= ((Args*)all[lane])->bits << lane; });
    for_lanes(mask, [&](unsigned lane) { ((Args*)all[lane])->bits = bits; });
    release(m, mask);
    return bits;
}

// A collective of the whole warp.
static bool join_all(Machine& m, Op op, void* args, const char* file, int line) {
    unsigned mask = ~0u;
    if (m.self->warp->lanes != mask)
        fail(nullptr, nullptr, 0, "thread %u calls %s (%s:%d) in a warp of fewer than 32 threads", m.self->index,
             OP_NAMES[op], file, line);
    return join(m, mask, op, args, file, line);
}

typedef float Float8 __attribute__((vector_size(32)));
static float half_of(unsigned two, int i) {
    const unsigned bits = i ? two & 0xFFFF0000u : two << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// The fragment layout is in mma.cuh. Each sum takes k in ascending order, one rounding a product and one a sum.
void mma_bf16(float* d, const unsigned* a, const unsigned* b, const char* file, int line) {
    struct Args { float* d; const unsigned* a; const unsigned* b; } args{d, a, b};
    Machine& m = *machine;
    if (!join_all(m, MMA_BF16, &args, file, line)) return;
    const Args* const* all = (const Args* const*)m.self->warp->args;
    float rows[16][16];
    Float8 b_rows[16], sums[16];
    for (int lane = 0; lane < 32; ++lane) {
        const Args& its = *all[lane];
        const int group = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 2; ++j) rows[group + 8 * (i & 1)][2 * t + j + 8 * (i >> 1)] = half_of(its.a[i], j);
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) ((float*)&b_rows[2 * t + j + 8 * i])[group] = half_of(its.b[i], j);
        for (int i = 0; i < 4; ++i) ((float*)&sums[group + 8 * (i / 2)])[2 * t + i % 2] = its.d[i];
    }
    for (int row = 0; row < 16; ++row) {
        Float8 sum = sums[row];
        for (int k = 0; k < 16; ++k) sum += rows[row][k] * b_rows[k];
        sums[row] = sum;
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) all[lane]->d[i] = ((float*)&sums[lane / 4 + 8 * (i / 2)])[2 * (lane % 4) + i % 2];
    release(m, ~0u);
}

static bool is_shared(const Machine& m, const void* p, size_t n_bytes) {
    const size_t in_smem = (size_t)p - (size_t)m.smem, in_static = (size_t)p - (size_t)m.static_smem;
    const size_t static_bytes = m.launch->module->static_smem_bytes;
    return (in_smem < m.launch->smem_bytes && in_smem + n_bytes <= m.launch->smem_bytes)
           || (in_static < static_bytes && in_static + n_bytes <= static_bytes);
}

void load_matrix(unsigned* r, const void* row, int n_matrices, bool is_trans, const char* file, int line) {
    struct Args { unsigned* r; const unsigned short* row; } args{r, (const unsigned short*)row};
    Machine& m = *machine;
    const Op op = is_trans ? LOAD_MATRIX_TRANS : LOAD_MATRIX;
    if (m.self->lane < 8u * n_matrices) {
        if (!is_shared(m, row, 16) || (size_t)row % 16)
            fail(nullptr, nullptr, (uint64_t)row, "thread %u names a row for %s (%s:%d) that is not 16 bytes of shared "
                 "memory at a multiple of 16: {address}", m.self->index, OP_NAMES[op], file, line);
        if (m.is_checked) check::access(row, 16, false, __builtin_return_address(0));
    }
    if (!join_all(m, op, &args, file, line)) return;
    const Args* const* all = (const Args* const*)m.self->warp->args;
    for (int i = 0; i < n_matrices; ++i) {
        unsigned short matrix[8][8];
        for (int j = 0; j < 8; ++j) memcpy(matrix[j], all[8 * i + j]->row, 16);
        for (int lane = 0; lane < 32; ++lane) {
            const int major = lane / 4, minor = lane % 4 * 2;
            all[lane]->r[i] = is_trans ? matrix[minor][major] | (unsigned)matrix[minor + 1][major] << 16
                                       : matrix[major][minor] | (unsigned)matrix[major][minor + 1] << 16;
        }
    }
    release(m, ~0u);
}

// The bytes land when the thread waits for their group, and hold a pattern until then: a missing wait shows.
void copy_async(void* to, const void* from, unsigned n_bytes, bool is_read) {
    Machine& m = *machine;
    const void* pc = __builtin_return_address(0);
    if (!is_shared(m, to, n_bytes))
        fail(pc, nullptr, (uint64_t)to, "thread %u copies with copy_async at {at} to what is not shared memory: {address}",
             m.self->index);
    if ((size_t)to % n_bytes || (is_read && (size_t)from % n_bytes))
        fail(pc, nullptr, (size_t)to % n_bytes ? (uint64_t)to : (uint64_t)from, "misaligned: thread %u copies %u bytes with "
             "copy_async at {at}; {address} is not at a multiple of %u", m.self->index, n_bytes, n_bytes);
    if (m.is_checked) {
        if (is_read) check::access(from, n_bytes, false, pc);
        check::access(to, n_bytes, true, pc);
        check::forget(to, n_bytes);
    }
    memset(to, 0xFF, n_bytes);
    m.holds_heap = true;
    m.self->copies.push_back({(unsigned char*)to, (const unsigned char*)from, n_bytes, m.self->n_groups, is_read, pc});
    m.holds_heap = false;
}

void copy_commit() { ++machine->self->n_groups; }

void copy_wait(unsigned n_open) {
    Machine& m = *machine;
    std::vector<Copy>& copies = m.self->copies;
    size_t i = 0;
    for (; i < copies.size() && copies[i].group + n_open < m.self->n_groups; ++i) {
        const Copy& copy = copies[i];
        if (m.is_checked) check::land(copy.to, copy.n_bytes, copy.pc);
        if (copy.is_read) memcpy(copy.to, copy.from, copy.n_bytes);
        else memset(copy.to, 0, copy.n_bytes);
    }
    copies.erase(copies.begin(), copies.begin() + i);
}

}  // namespace emu
