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

}  // namespace emu

#include "collectives.cpp"

namespace emu {

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

// Where in the kernel a signal came: there, or in a hook of the checker, or in what the stack says was called last.
static const void* interrupted_at(const Machine& m, void* context) {
    const mcontext_t& at = ((ucontext_t*)context)->uc_mcontext;
#if defined(__x86_64__)
    size_t pc = at.gregs[REG_RIP] + 1, sp = at.gregs[REG_RSP];       // + 1: like a return address, behind its instruction
#elif defined(__aarch64__)
    size_t pc = at.pc + 1, sp = at.sp;
#else
    size_t pc = 0, sp = 0;
#endif
    const Module& module = *m.launch->module;
    if (m.is_checked && (pc <= module.begin || pc >= module.end)) return m.last_pc;
    for (; (pc <= module.begin || pc >= module.end) && sp - m.stack < STACK_BYTES - 8; sp += 8) pc = *(size_t*)sp;
    return (const void*)pc;
}

// Comes every so often on each thread that runs blocks: a block that outlasts the limit spins.
static void on_tick(int, siginfo_t*, void* context) {
    Machine* m = machine;
    if (!m || m->holds_heap) return;
    if (m->n_blocks != m->n_blocks_seen) {
        m->n_blocks_seen = m->n_blocks;
        m->n_ticks = 0;
    } else if (++m->n_ticks >= 4) {
        fail(interrupted_at(*m, context), nullptr, 0, "ran for more than %g s; thread %u spins at {at}",
             m->launch->time_limit_s, m->self->index);
    }
}

static struct sigaction former_segv;

static void on_bad_address(int signal, siginfo_t* info, void* context) {
    if (machine && machine->self && !machine->holds_heap)
        fail(interrupted_at(*machine, context), nullptr, (uint64_t)info->si_addr,
             "out of bounds or misaligned: thread %u cannot access {address}, at {at}", machine->self->index);
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

// False where the system has no timers left: then a block that spins is never stopped.
static bool start_ticks(double limit_s, timer_t* timer) {
    struct sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGRTMIN + 7;
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
    event.sigev_notify_thread_id = (int)syscall(SYS_gettid);
    if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, timer)) return false;
    const double tick_s = limit_s / 4;
    const timespec tick = {(time_t)tick_s, (long)((tick_s - (time_t)tick_s) * 1e9)};
    const itimerspec period = {tick, tick};
    timer_settime(*timer, 0, &period, nullptr);
    return true;
}

extern "C" void* __tls_get_addr(size_t*);

struct Work {
    const Launch& launch;
    Report& report;
    uint64_t n_blocks;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
    unsigned n_helpers = 0;                              // that are in it now
};

static void run_blocks(Work& work) {
    const Launch& launch = work.launch;
    if (work.failed || work.next >= work.n_blocks) return;
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
    timer_t timer;
    const bool has_timer = start_ticks(launch.time_limit_s, &timer);
    machine = m;
    for (uint64_t i; !work.failed && (i = work.next++) < work.n_blocks;) {
        m->block = packed(i % launch.grid[0], i / launch.grid[0] % launch.grid[1], i / launch.grid[0] / launch.grid[1]);
        run_block(*m);
        if (m->report.is_error && !work.failed.exchange(true)) work.report = m->report;
    }
    machine = nullptr;
    if (has_timer) timer_delete(timer);
    pthread_mutex_lock(&lock);
    if (m->is_checked) check::end_machine(*m);
    idle.push_back(m);
    pthread_mutex_unlock(&lock);
}

// Threads that wait for launches. The one that launches runs blocks too, and waits for no helper that has not begun.
static std::vector<Work*> open_work;
static unsigned n_helpers;
static pthread_cond_t has_work = PTHREAD_COND_INITIALIZER, has_left = PTHREAD_COND_INITIALIZER;

static void close(Work& work) { open_work.erase(std::remove(open_work.begin(), open_work.end(), &work), open_work.end()); }

static void* help(void*) {
    pthread_mutex_lock(&lock);
    for (;;) {
        while (open_work.empty()) pthread_cond_wait(&has_work, &lock);
        Work& work = *open_work.back();
        ++work.n_helpers;
        pthread_mutex_unlock(&lock);
        run_blocks(work);
        pthread_mutex_lock(&lock);
        close(work);                                     // no block is left
        if (--work.n_helpers == 0) pthread_cond_broadcast(&has_left);
    }
    return nullptr;
}

static void run(Work& work, unsigned n_workers) {
    if (work.n_blocks == 1 || n_workers == 1) {
        run_blocks(work);
        return;
    }
    pthread_mutex_lock(&lock);
    for (pthread_t thread; n_helpers + 1 < n_workers && pthread_create(&thread, nullptr, help, nullptr) == 0; ++n_helpers)
        pthread_detach(thread);
    open_work.push_back(&work);
    pthread_cond_broadcast(&has_work);
    pthread_mutex_unlock(&lock);
    run_blocks(work);
    pthread_mutex_lock(&lock);
    close(work);
    while (work.n_helpers) pthread_cond_wait(&has_left, &lock);
    pthread_mutex_unlock(&lock);
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
    const unsigned* grid = launch->grid;
    if (grid[1] > MAX_GRID_YZ || grid[2] > MAX_GRID_YZ || dim[2] > MAX_THREADS_Z || !(dim[0] && dim[1] && dim[2])) {
        report->is_error = 2;
        snprintf(report->text, sizeof report->text, "grid (%u, %u, %u) of blocks of (%u, %u, %u) threads; a grid has at most "
                 "%u blocks in y and z, a block 1 to %u threads in z and at least 1 in x and y", grid[0], grid[1], grid[2],
                 dim[0], dim[1], dim[2], MAX_GRID_YZ, MAX_THREADS_Z);
        return;
    }
    watch_signals();
    if (launch->is_checked) check::start_launch(*launch);
    Work work{*launch, *report, (uint64_t)launch->grid[0] * launch->grid[1] * launch->grid[2]};
    run(work, launch->n_workers);
}

#include "checker.cpp"
