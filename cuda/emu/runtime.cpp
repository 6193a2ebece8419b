// The machine behind emu.h: fibers, barriers, warps, and blocks handed to OS threads. Built once, loaded once.
#include "machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
// Saves the callee-saved registers on the stack, leaves the stack pointer in *save, and goes on from `load`.
extern "C" void emu_switch(emu::Context** save, emu::Context* load);
asm(".text\n.globl emu_switch\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\npopq %rcx\njmp *%rcx\n");

namespace emu {
static Context* new_context() { return nullptr; }
static void start(Fiber& f, void (*entry)()) {
    void** top = (void**)(f.stack + STACK_BYTES - 64);   // emu_switch goes to entry with the stack aligned as in a call
    top[0] = (void*)entry;
    top[1] = nullptr;
    f.context = (Context*)(top - 6);
}
static void switch_to(Context*& save, Context* load) { emu_switch(&save, load); }
}  // namespace emu
#else
namespace emu {
struct Context { ucontext_t u; };
static Context* new_context() { return new Context(); }
static void start(Fiber& f, void (*entry)()) {
    getcontext(&f.context->u);
    f.context->u.uc_stack.ss_sp = f.stack;
    f.context->u.uc_stack.ss_size = STACK_BYTES;
    f.context->u.uc_link = nullptr;
    makecontext(&f.context->u, entry, 0);
}
static void switch_to(Context*& save, Context* load) { swapcontext(&save->u, &load->u); }
}  // namespace emu
#endif

namespace emu {

thread_local Machine* machine;
static const char* const OP_NAMES[] = {"__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                                       "__ballot_sync", "__any_sync", "__all_sync", "mma_bf16", "load_matrix",
                                       "load_matrix_trans"};

uint64_t thread_bits() { return machine->self->thread; }
uint64_t block_bits() { return machine->block; }
uint64_t block_dim_bits() { return machine->block_dim; }
uint64_t grid_dim_bits() { return machine->grid_dim; }
unsigned lane_index() { return machine->self->lane; }
unsigned char* dynamic_smem() { return machine->smem; }

static uint64_t packed(uint64_t x, uint64_t y, uint64_t z) { return x | y << 32 | z << 48; }

// Ends the block, and the launch, with a report. The fibers of the block are left where they are.
void fail(const void* pc, const void* other_pc, uint64_t address, const char* format, ...) {
    Machine& m = *machine;
    m.report = {1, {(unsigned)m.block, (unsigned)(m.block >> 32) & 0xFFFF, (unsigned)(m.block >> 48)},
                (uint64_t)pc, (uint64_t)other_pc, address, {}};
    va_list list;
    va_start(list, format);
    vsnprintf(m.report.text, sizeof m.report.text, format, list);
    va_end(list);
    switch_to(m.self->context, m.main_context);
    __builtin_unreachable();
}

static void push(Machine& m, unsigned i) {
    m.queue[m.tail] = (unsigned short)i;
    m.tail = m.tail == MAX_THREADS ? 0 : m.tail + 1;
}

// Nobody can run: two threads that wait for different things say why.
static void fail_deadlock(Machine& m) {
    const Fiber* a = nullptr;
    for (unsigned i = 0; i < m.n_threads; ++i) {
        const Fiber& f = m.fibers[i];
        if (f.is_done) continue;
        if (!a) a = &f;
        else if (f.waits_in != a->waits_in || f.line != a->line || f.file != a->file)
            fail(nullptr, nullptr, 0, "thread %u waits in %s (%s:%d), thread %u in %s (%s:%d): none can go on", a->index,
                 a->waits_in, a->file, a->line, f.index, f.waits_in, f.file, f.line);
    }
    fail(nullptr, nullptr, 0, "thread %u waits in %s (%s:%d) for threads that never come", a->index, a->waits_in, a->file,
         a->line);
}

static void run_next(Machine& m) {
    Fiber* me = m.self;
    if (m.head == m.tail) fail_deadlock(m);
    Fiber* next = &m.fibers[m.queue[m.head]];
    m.head = m.head == MAX_THREADS ? 0 : m.head + 1;
    if (next == me) return;
    m.self = next;
    m.stack = (size_t)next->stack;
    switch_to(me->context, next->context);
}

static void wait_in(Machine& m, const char* what, const char* file, int line) {
    Fiber& me = *m.self;
    me.waits_in = what;
    me.file = file;
    me.line = line;
    run_next(m);
    me.waits_in = nullptr;
}

static unsigned first_done(Machine& m) {
    unsigned i = 0;
    while (!m.fibers[i].is_done) ++i;
    return i;
}

void sync_block(const char* file, int line) {
    Machine& m = *machine;
    const unsigned me = m.self->index;
    if (m.n_done)
        fail(nullptr, nullptr, 0, "thread %u waits in __syncthreads (%s:%d), thread %u has returned", me, file, line,
             first_done(m));
    if (m.n_at_barrier && (m.barrier_line != line || m.barrier_file != file))
        fail(nullptr, nullptr, 0, "thread %u is in __syncthreads (%s:%d) while others wait in another one (%s:%d)", me, file,
             line, m.barrier_file, m.barrier_line);
    m.barrier_file = file;
    m.barrier_line = line;
    if (++m.n_at_barrier < m.n_threads) {
        wait_in(m, "__syncthreads", file, line);
        return;
    }
    m.n_at_barrier = 0;
    if (m.is_checked) check::sync_block(m);
    for (unsigned i = 0; i < m.n_threads; ++i)
        if (i != me) push(m, i);
}

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
    return (size_t)p - (size_t)m.smem <= m.launch->smem_bytes - n_bytes && n_bytes <= m.launch->smem_bytes
           || (size_t)p - (size_t)m.static_smem <= m.launch->module->static_smem_bytes - n_bytes
                  && n_bytes <= m.launch->module->static_smem_bytes;
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

static void fiber_main() {
    Machine& m = *machine;
    m.launch->run(m.launch->args);
    Fiber& me = *m.self;
    Warp& warp = *me.warp;
    me.is_done = true;
    warp.done |= 1u << me.lane;
    if (++m.n_done == m.n_threads) switch_to(me.context, m.main_context);
    unsigned awaited = m.n_at_barrier;
    for (const Group& group : warp.groups) awaited |= group.n_arrived && group.mask >> me.lane & 1;
    for (unsigned i = 0; awaited && i < m.n_threads; ++i) {
        const Fiber& f = m.fibers[i];
        if (f.waits_in && (m.n_at_barrier || f.warp == &warp))
            fail(nullptr, nullptr, 0, "thread %u waits in %s (%s:%d), thread %u has returned", f.index, f.waits_in, f.file,
                 f.line, me.index);
    }
    run_next(m);
}

static void run_block(Machine& m) {
    const Launch& launch = *m.launch;
    m.n_threads = launch.dim[0] * launch.dim[1] * launch.dim[2];
    m.head = m.tail = m.n_done = m.n_at_barrier = 0;
    ++m.n_blocks;
    memset(m.smem, 0xFF, launch.smem_bytes);             // NaN in every float format
    memset(m.static_smem, 0xFF, launch.module->static_smem_bytes);
    for (unsigned w = 0; 32 * w < m.n_threads; ++w) {
        Warp& warp = m.warps[w];
        warp.lanes = m.n_threads - 32 * w < 32 ? (1u << (m.n_threads - 32 * w)) - 1 : ~0u;
        warp.done = 0;
        memset(warp.groups, 0, sizeof warp.groups);
    }
    for (unsigned i = 0; i < m.n_threads; ++i) {
        Fiber& f = m.fibers[i];
        f.stack = m.stacks + (size_t)i * STACK_BYTES;
        f.thread = packed(i % launch.dim[0], i / launch.dim[0] % launch.dim[1], i / (launch.dim[0] * launch.dim[1]));
        f.index = i;
        f.lane = i % 32;
        f.warp = &m.warps[i / 32];
        f.waits_in = nullptr;
        f.is_done = false;
        f.n_groups = f.n_log = 0;
        f.copies.clear();
        if (!f.context) f.context = new_context();
        start(f, fiber_main);
        push(m, i);
    }
    if (m.is_checked) check::start_block(m);
    m.self = &m.fibers[m.queue[m.head++]];
    m.stack = (size_t)m.self->stack;
    switch_to(m.main_context, m.self->context);
    if (m.is_checked && !m.report.is_error)
        for (unsigned w = 0; 32 * w < m.n_threads; ++w) check::converge(m, m.warps[w]);
}

static std::vector<Machine*> idle;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Machine* take_machine() {
    pthread_mutex_lock(&lock);
    Machine* m = idle.empty() ? nullptr : idle.back();
    if (m) idle.pop_back();
    pthread_mutex_unlock(&lock);
    if (m) return m;
    m = new Machine();
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    m->stacks = (unsigned char*)mmap(nullptr, (size_t)MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    m->smem = (unsigned char*)mmap(nullptr, MAX_SMEM + 4096, PROT_READ | PROT_WRITE, flags, -1, 0);
    m->main_context = new_context();
    return m;
}

static const void* interrupted_at(void* context) {
#if defined(__x86_64__)
    return (const void*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
    return (const void*)((ucontext_t*)context)->uc_mcontext.pc;
#else
    return nullptr;
#endif
}

// Comes every so often on each thread that runs blocks: a block that outlasts the limit spins.
static void on_tick(int, siginfo_t*, void* context) {
    Machine* m = machine;
    if (!m || m->holds_heap) return;
    if (m->n_blocks != m->n_blocks_seen) {
        m->n_blocks_seen = m->n_blocks;
        m->n_ticks = 0;
    } else if (++m->n_ticks >= 4) {
        fail(interrupted_at(context), nullptr, 0, "ran for more than %g s; thread %u spins at {at}",
             m->launch->time_limit_s, m->self->index);
    }
}

static struct sigaction former_segv;

static void on_bad_address(int signal, siginfo_t* info, void* context) {
    if (machine && machine->self && !machine->holds_heap)
        fail(interrupted_at(context), nullptr, (uint64_t)info->si_addr, "out of bounds or misaligned: thread %u cannot "
             "access {address}, at {at}", machine->self->index);
    sigaction(signal, &former_segv, nullptr);            // not ours: the access runs again, into who was there before
}

static void watch_signals() {
    struct sigaction action = {};
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
    action.sa_sigaction = on_tick;
    sigaction(SIGRTMIN + 7, &action, nullptr);
    struct sigaction now;
    sigaction(SIGSEGV, nullptr, &now);
    if (now.sa_sigaction == on_bad_address) return;
    former_segv = now;
    action.sa_sigaction = on_bad_address;
    sigaction(SIGSEGV, &action, nullptr);
}

static timer_t start_ticks(double limit_s) {
    struct sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGRTMIN + 7;
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
    event.sigev_notify_thread_id = (int)syscall(SYS_gettid);
    timer_t timer;
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
    const double tick_s = limit_s / 4;
    const timespec tick = {(time_t)tick_s, (long)((tick_s - (time_t)tick_s) * 1e9)};
    const itimerspec period = {tick, tick};
    timer_settime(timer, 0, &period, nullptr);
    return timer;
}

extern "C" void* __tls_get_addr(size_t*);

struct Work {
    const Launch& launch;
    Report& report;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
};

static void* work(void* argument) {
    Work& work = *(Work*)argument;
    const Launch& launch = work.launch;
    Machine* m = take_machine();
    m->launch = &launch;
    m->is_checked = launch.is_checked;
    m->report.is_error = 0;
    m->n_ticks = 0;
    size_t tls[2] = {launch.module->tls_module, 0};
    m->static_smem = launch.module->static_smem_bytes ? (unsigned char*)__tls_get_addr(tls) : m->smem;
    m->block_dim = packed(launch.dim[0], launch.dim[1], launch.dim[2]);
    m->grid_dim = packed(launch.grid[0], launch.grid[1], launch.grid[2]);
    if (m->is_checked) check::start_machine(*m);
    const uint64_t n = (uint64_t)launch.grid[0] * launch.grid[1] * launch.grid[2];
    const timer_t timer = start_ticks(launch.time_limit_s);
    machine = m;
    for (uint64_t i; !work.failed && (i = work.next++) < n;) {
        m->block = packed(i % launch.grid[0], i / launch.grid[0] % launch.grid[1], i / launch.grid[0] / launch.grid[1]);
        run_block(*m);
        if (m->report.is_error && !work.failed.exchange(true)) work.report = m->report;
    }
    machine = nullptr;
    timer_delete(timer);
    pthread_mutex_lock(&lock);
    if (m->is_checked) check::end_machine(*m);
    idle.push_back(m);
    pthread_mutex_unlock(&lock);
    return nullptr;
}

static int find_module(dl_phdr_info* info, size_t, void* argument) {
    Module& module = *(Module*)argument;
    size_t end = 0, tls_bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr)& part = info->dlpi_phdr[i];
        const size_t part_end = info->dlpi_addr + part.p_vaddr + part.p_memsz;
        if (part.p_type == PT_LOAD && part_end > end) end = part_end;
        if (part.p_type == PT_TLS) tls_bytes = part.p_memsz;
    }
    if (module.begin < info->dlpi_addr || module.begin >= end) return 0;
    module = {info->dlpi_addr, end, info->dlpi_tls_modid, tls_bytes};
    return 1;
}

}  // namespace emu

// Finds the loaded file that holds `run`.
extern "C" void emu_module(const void* run, emu::Module* module) {
    module->begin = (size_t)run;
    dl_iterate_phdr(emu::find_module, module);
}

// Runs a kernel over a grid; launch.run unpacks the arguments and calls it for one thread.
extern "C" void emu_launch(const emu::Launch* launch, emu::Report* report) {
    using namespace emu;
    const unsigned* dim = launch->dim;
    const size_t static_bytes = launch->module->static_smem_bytes;
    report->is_error = 0;
    if ((uint64_t)dim[0] * dim[1] * dim[2] > MAX_THREADS || launch->smem_bytes + static_bytes > MAX_SMEM
        || static_bytes > MAX_STATIC_SMEM) {
        report->is_error = 2;
        snprintf(report->text, sizeof report->text, "%u x %u x %u threads, %zu bytes of static and %zu of dynamic shared "
                 "memory; a block has at most %u threads and %zu bytes, %zu of them static", dim[0], dim[1], dim[2],
                 static_bytes, (size_t)launch->smem_bytes, MAX_THREADS, MAX_SMEM, MAX_STATIC_SMEM);
        return;
    }
    watch_signals();
    if (launch->is_checked) check::start_launch(*launch);
    Work todo{*launch, *report};
    const uint64_t n_blocks = (uint64_t)launch->grid[0] * launch->grid[1] * launch->grid[2];
    std::vector<pthread_t> workers;
    for (unsigned i = 1; i < launch->n_workers && i < n_blocks; ++i) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, work, &todo) == 0) workers.push_back(thread);
    }
    work(&todo);
    for (pthread_t thread : workers) pthread_join(thread, nullptr);
}

#include "checker.cpp"
