// SPDX-License-Identifier: GPL-2.0
/*
 * Everything that a VMM and its guest can do to a guest_memfd, in random order.
 *
 * The main thread takes one step after the other, as the seed has it, and keeps
 * a model of what every page of every file should hold.  Steps that make some of
 * it checkable check it, through the guest and through the VMM's mapping.
 *
 * Others do at the same time what must not change the contents: a vCPU and a
 * thread of the VMM fault pages in, hold on to them and let go of them.  In the
 * last quarter of a file, whose contents nobody cares about, that thread punches
 * holes, too.  The timing of that is not part of the seed, i.e. to see a failure
 * again, its seed may have to be replayed more than once.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <linux/falloc.h>
#include <linux/stddef.h>
#include <linux/io_uring.h>
#include <linux/mman.h>
#include <linux/sizes.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <asm/barrier.h>

#include "guest_memfd.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"

#define GMEM_SHARED	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)

#define NR_FILES	4
#define NR_SLOTS	6
#define NR_PINS		4
/* Pages with memory errors are lost to the machine. */
#define MAX_POISON	12

/* Of files of 1 GiB, the first pages are used, and all of it is populated. */
#define MAX_PAGES	2048UL
#define NPAGES_2M	((uint64_t)(SZ_2M / PAGE_SIZE))
#define NPAGES_1G	((uint64_t)(SZ_1G / PAGE_SIZE))

/* Each memslot has a window of guest memory of its own. */
#define WINDOW_SIZE	(2UL * SZ_1G)
#define WINDOW_GPA(i)	(SZ_4G + (i) * WINDOW_SIZE)
#define FIRST_SLOT	10

#define MAIN_VCPU	0
#define NOISE_VCPU	1

/*
 * What a page holds: a number that no other page has or had, i.e. that tells
 * stale data from good one, and code that returns its lower half.  Zero is for
 * a page of zeros, and UNKNOWN for a page that isn't to be looked at.
 */
#define UNKNOWN		(~0ULL)
#define CODE_OFFSET	64
#define LAST_WORD	(PAGE_SIZE / sizeof(uint64_t) - 1)
/* Nobody but the noise writes this word, without changing it. */
#define NOISE_WORD	32

static const uint8_t code[] = { 0xb8, 0, 0, 0, 0, 0xc3 };	/* mov $imm32, %eax; ret */

struct file {
	/* -1 if there's none. */
	int fd;
	uint64_t flags;
	uint64_t npages;
	/* How many of them the model is about, the ones behind are the noise's. */
	uint64_t active;
	uint64_t *mem;
	uint64_t stamps[MAX_PAGES];
	bool poisoned[MAX_PAGES];
};

struct slot {
	/* NULL if there's none. */
	struct file *file;
	uint64_t gpa;
	uint64_t pgoff;
	uint64_t npages;
	/* For what isn't private, if the file is. */
	uint64_t *shared;
	/* KVM has no use for it, whatever it is, but updates have to repeat it. */
	void *hva;
	/* KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES */
	uint32_t flags;
	uint64_t stamps[MAX_PAGES];
	bool private[MAX_PAGES];
};

struct pin {
	/* NULL if there's none. */
	struct file *file;
	uint64_t page;
	/* The page has been in a hole since, i.e. the pin may not be the file's. */
	bool stale;
	int pipe[2];
	int uring;
};

static struct file files[NR_FILES];
static struct slot slots[NR_SLOTS];
static struct pin pins[NR_PINS];

static struct kvm_vm *vm;
static struct kvm_vcpu *main_vcpu, *noise_vcpu;
static struct kvm_regs main_regs, noise_regs;
static bool protected_vm, verbose;
/* Getting the dirty log leaves it as it is, clearing it is up to the VMM. */
static bool manual_log;
/* Dirty pages are in a ring of each vCPU instead. */
static bool ring_log;
static uint64_t supported_flags, supported_slots, step, last_stamp;
static int nr_poisoned;
static struct guest_random_state rng;

#define log_step(fmt, ...)							\
do {										\
	if (verbose)								\
		pr_info("%lu: " fmt "\n", step, ##__VA_ARGS__);			\
} while (0)

static uint64_t rnd(uint64_t limit)
{
	return guest_random_u32(&rng) % limit;
}

static bool one_in(int n)
{
	return !rnd(n);
}

/*
 * The guest
 */

enum work_op {
	WORK_WRITE,
	WORK_CHECK,
	WORK_EXECUTE,
};

struct work {
	uint64_t op;
	uint64_t gva;
	uint64_t nr;
	/* The page that's being worked on, and what was wrong with it. */
	uint64_t at;
	uint64_t seen;
	uint64_t failed;
	uint64_t stamps[MAX_PAGES];
};

static struct work guest_work;

static void write_page(uint64_t *page, uint64_t stamp)
{
	uint8_t *insn = (uint8_t *)page + CODE_OFFSET;

	page[0] = stamp;
	memcpy(insn, code, sizeof(code));
	*(uint32_t *)(insn + 1) = stamp;
	page[LAST_WORD] = ~stamp;
}

static bool page_is_good(uint64_t *page, uint64_t stamp, uint64_t *seen)
{
	*seen = page[0];
	if (*seen != stamp)
		return false;

	*seen = page[LAST_WORD];
	return *seen == (stamp ? ~stamp : 0);
}

typedef uint32_t (page_code)(void);

static bool page_runs(uint64_t *page, uint64_t stamp, uint64_t *seen)
{
	page_code *function = (page_code *)((uint8_t *)page + CODE_OFFSET);

	/* There's no code in a page of zeros. */
	if (!stamp)
		return true;

	*seen = function();
	return *seen == (uint32_t)stamp;
}

static bool do_page(uint64_t op, uint64_t *page, uint64_t stamp, uint64_t *seen)
{
	switch (op) {
	case WORK_WRITE:
		write_page(page, stamp);
		return true;
	case WORK_CHECK:
		return page_is_good(page, stamp, seen);
	case WORK_EXECUTE:
		return page_is_good(page, stamp, seen) && page_runs(page, stamp, seen);
	}
	return false;
}

static void guest_main(void)
{
	struct work *w = &guest_work;

	for (;;) {
		for (w->at = 0; w->at < w->nr; w->at++) {
			uint64_t *page = (void *)(w->gva + w->at * PAGE_SIZE);

			if (w->stamps[w->at] == UNKNOWN)
				continue;
			if (!do_page(w->op, page, w->stamps[w->at], &w->seen)) {
				w->failed = true;
				break;
			}
		}
		GUEST_SYNC(0);
	}
}

/* Where the noise may go, kept up-to-date by the main thread. */
struct window {
	uint64_t gva;
	uint64_t npages;
};

static struct window guest_windows[NR_SLOTS];
static uint64_t guest_noise_seed;

static void guest_noise(void)
{
	struct guest_random_state state = new_guest_random_state(guest_noise_seed);

	for (;;) {
		for (int i = 0; i < 1000; i++) {
			struct window *w = &guest_windows[guest_random_u32(&state) % NR_SLOTS];
			uint64_t npages = READ_ONCE(w->npages), gva = READ_ONCE(w->gva);
			uint64_t *word;

			if (!npages)
				continue;
			gva += guest_random_u32(&state) % npages * PAGE_SIZE;
			word = (uint64_t *)gva + NOISE_WORD;

			if (guest_random_bool(&state))
				asm volatile("lock orq $0, %0" : "+m" (*word));
			else
				READ_ONCE(*word);
		}
		GUEST_SYNC(0);
	}
}

/*
 * The model
 */

static struct file *random_file(void)
{
	struct file *f = &files[rnd(NR_FILES)];

	return f->fd < 0 ? NULL : f;
}

static struct file *random_mapped_file(void)
{
	struct file *f = random_file();

	return f && f->mem ? f : NULL;
}

static struct slot *random_slot(void)
{
	struct slot *s = &slots[rnd(NR_SLOTS)];

	return s->file ? s : NULL;
}

static bool is_shared(struct file *f)
{
	return f->flags & GUEST_MEMFD_FLAG_INIT_SHARED;
}

static uint64_t slot_page(struct slot *s, uint64_t i)
{
	return s->pgoff + i;
}

/* Is page @i of the slot that of the file? */
static bool is_files(struct slot *s, uint64_t i)
{
	return is_shared(s->file) || s->private[i];
}

static uint64_t *slot_stamp(struct slot *s, uint64_t i)
{
	return is_files(s, i) ? &s->file->stamps[slot_page(s, i)] : &s->stamps[i];
}

/* The noise may be about to change the last pages of a file. */
static bool is_usable(struct slot *s, uint64_t i)
{
	uint64_t page = slot_page(s, i);

	return !is_files(s, i) || (page < s->file->active && !s->file->poisoned[page]);
}

static uint64_t *page_address(struct file *f, uint64_t page)
{
	return f->mem + page * (PAGE_SIZE / sizeof(*f->mem));
}

/* A range of at most @npages pages, often a small one, often a huge page. */
static void random_range(uint64_t npages, uint64_t *first, uint64_t *nr)
{
	*first = rnd(npages);
	switch (rnd(4)) {
	case 0:
		*nr = 1 + rnd(npages - *first);
		break;
	case 1:
		*first = round_down(*first, NPAGES_2M);
		*nr = min(NPAGES_2M, npages - *first);
		break;
	default:
		*nr = min(1 + rnd(8), npages - *first);
	}
}

static void vmm_checks(struct file *f, uint64_t first, uint64_t nr)
{
	uint64_t i, seen = 0;

	nr = first < f->active ? min(nr, f->active - first) : 0;
	for (i = first; i < first + nr; i++) {
		if (f->poisoned[i] || f->stamps[i] == UNKNOWN)
			continue;
		TEST_ASSERT(page_is_good(page_address(f, i), f->stamps[i], &seen),
			    "VMM sees 0x%lx in page %lu of file %ld, expected 0x%lx, step %lu, seed 0x%x",
			    seen, i, f - files, f->stamps[i], step, guest_random_seed);
	}
}

/*
 * The dirty rings
 */

/* So few that what the guest writes at once may be more than fits. */
#define RING_SIZE	(SZ_1K * sizeof(struct kvm_dirty_gfn))

static pthread_mutex_t ring_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned long ring_logs[NR_SLOTS][MAX_PAGES / BITS_PER_LONG];
/* How many entries of each vCPU's ring have been collected. */
static uint32_t nr_collected[2];

static void log_dirty_gfn(struct kvm_dirty_gfn *gfn)
{
	unsigned long *log;

	/* The memory that the guest runs in has a slot, too. */
	if (gfn->slot < FIRST_SLOT)
		return;

	TEST_ASSERT(gfn->slot < FIRST_SLOT + NR_SLOTS && gfn->offset < MAX_PAGES,
		    "Dirty page 0x%llx of slot 0x%x, step %lu, seed 0x%x", gfn->offset, gfn->slot,
		    step, guest_random_seed);
	log = ring_logs[gfn->slot - FIRST_SLOT];
	log[gfn->offset / BITS_PER_LONG] |= BIT(gfn->offset % BITS_PER_LONG);
}

static void collect_ring(struct kvm_vcpu *vcpu)
{
	struct kvm_dirty_gfn *ring = vcpu_map_dirty_ring(vcpu), *gfn;

	for (;;) {
		gfn = &ring[nr_collected[vcpu->id] % vcpu->dirty_gfns_count];
		/* KVM sets the flag when the rest of the entry is there. */
		if (smp_load_acquire(&gfn->flags) != KVM_DIRTY_GFN_F_DIRTY)
			return;
		log_dirty_gfn(gfn);
		/* From here on the entry is KVM's again. */
		smp_store_release(&gfn->flags, KVM_DIRTY_GFN_F_RESET);
		nr_collected[vcpu->id]++;
	}
}

/*
 * Both vCPUs' rings: a page that one of them has made dirty is writable for the
 * other, which doesn't log it again.  @log is NULL or for slot @i, whose log
 * starts anew.
 */
static void collect_rings(int i, unsigned long *log)
{
	pthread_mutex_lock(&ring_lock);
	collect_ring(main_vcpu);
	collect_ring(noise_vcpu);
	kvm_vm_reset_dirty_ring(vm);
	if (log) {
		memcpy(log, ring_logs[i], sizeof(ring_logs[i]));
		memset(ring_logs[i], 0, sizeof(ring_logs[i]));
	}
	pthread_mutex_unlock(&ring_lock);
}

/* Returns what KVM_RUN does once no ring is full. */
static int run_main_vcpu(void)
{
	int r;

	/* The ring has room again each time, i.e. it's a matter of a few rounds. */
	for (int i = 0; i < 10000; i++) {
		r = _vcpu_run(main_vcpu);
		if (r || main_vcpu->run->exit_reason != KVM_EXIT_DIRTY_RING_FULL)
			return r;
		collect_rings(0, NULL);
	}
	TEST_FAIL("The dirty ring stays full, step %lu, seed 0x%x", step, guest_random_seed);
	return -1;
}

/* Returns what KVM_RUN does. */
static int run_guest(struct slot *s, enum work_op op, uint64_t first, uint64_t nr)
{
	struct work *w = addr_gva2hva(vm, (vm_vaddr_t)&guest_work);
	struct ucall uc;
	int r;

	w->op = op;
	w->gva = s->gpa + first * PAGE_SIZE;
	w->nr = nr;
	w->failed = false;
	for (uint64_t i = 0; i < nr; i++)
		w->stamps[i] = is_usable(s, first + i) ? *slot_stamp(s, first + i) : UNKNOWN;

	r = run_main_vcpu();
	if (r)
		return r;

	TEST_ASSERT_KVM_EXIT_REASON(main_vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(get_ucall(main_vcpu, &uc), UCALL_SYNC);
	TEST_ASSERT(!w->failed,
		    "Guest sees 0x%lx in page %lu of slot %ld, i.e. page %lu of file %ld, expected 0x%lx, op %d, step %lu, seed 0x%x",
		    w->seen, first + w->at, s - slots, slot_page(s, first + w->at),
		    s->file - files, w->stamps[w->at], op, step, guest_random_seed);
	return 0;
}

static void guest_does(struct slot *s, enum work_op op, uint64_t first, uint64_t nr)
{
	struct work *w = addr_gva2hva(vm, (vm_vaddr_t)&guest_work);
	struct kvm_run *run = main_vcpu->run;
	int r = run_guest(s, op, first, nr);

	/* 39 is a memory fault, the only reason that has an address and flags. */
	TEST_ASSERT(!r,
		    "KVM_RUN failed, %s, exit reason %u, gpa 0x%llx, flags 0x%llx, page %lu of slot %ld at 0x%lx, step %lu, seed 0x%x",
		    strerror(errno), run->exit_reason, run->memory_fault.gpa,
		    run->memory_fault.flags, first + w->at, s - slots, s->gpa, step,
		    guest_random_seed);
}

static void guest_writes(struct slot *s, uint64_t first, uint64_t nr)
{
	for (uint64_t i = first; i < first + nr; i++) {
		if (is_usable(s, i))
			*slot_stamp(s, i) = ++last_stamp;
	}
	guest_does(s, WORK_WRITE, first, nr);
}

/* Check pages of the file in all places where somebody can see them. */
static void check_file(struct file *f, uint64_t first, uint64_t nr)
{
	uint64_t start, end;
	int i;

	for (i = 0; i < NR_SLOTS; i++) {
		struct slot *s = &slots[i];

		if (s->file != f)
			continue;
		start = max(first, s->pgoff);
		end = min(first + nr, s->pgoff + s->npages);
		if (start < end)
			guest_does(s, WORK_CHECK, start - s->pgoff, end - start);
	}
	if (f->mem)
		vmm_checks(f, first, nr);
}

static void check_all(void)
{
	int i;

	for (i = 0; i < NR_FILES; i++) {
		if (files[i].fd >= 0)
			check_file(&files[i], 0, files[i].active);
	}
}

/*
 * Files
 */

/* The noise uses files by fds of its own, so that none goes away under it. */
static pthread_mutex_t noise_lock = PTHREAD_MUTEX_INITIALIZER;

static bool has_pins(struct file *f)
{
	for (int i = 0; i < NR_PINS; i++) {
		if (pins[i].file == f)
			return true;
	}
	return false;
}

/* One takes enough memory. */
static bool has_gigantic_file(void)
{
	for (int i = 0; i < NR_FILES; i++) {
		if (files[i].fd >= 0 && files[i].npages == NPAGES_1G)
			return true;
	}
	return false;
}

static void do_create(void)
{
	static const uint64_t sizes[] = { 1, 7, 512, 513, 1024, 1500, MAX_PAGES };
	struct file *f = &files[rnd(NR_FILES)];
	uint64_t flags, npages;

	if (f->fd >= 0)
		return;

	npages = sizes[rnd(ARRAY_SIZE(sizes))];
	flags = protected_vm || one_in(8) ? 0 : GMEM_SHARED;
	if (!one_in(4))
		flags |= GUEST_MEMFD_FLAG_HUGE_2M;
	if (one_in(8)) {
		flags |= GUEST_MEMFD_FLAG_HUGE_1G;
		if (!has_gigantic_file())
			npages = NPAGES_1G;
	}
	flags &= supported_flags;

	log_step("file %ld: create, flags 0x%lx, %lu pages", f - files, flags, npages);
	pthread_mutex_lock(&noise_lock);
	memset(f, 0, sizeof(*f));
	f->fd = vm_create_guest_memfd(vm, npages * PAGE_SIZE, flags);
	f->flags = flags;
	f->npages = npages;
	f->active = min(npages, MAX_PAGES);
	f->active -= f->active / 4;
	pthread_mutex_unlock(&noise_lock);
}

static void unmap_file(struct file *f)
{
	if (!f->mem)
		return;
	munmap(f->mem, min(f->npages, MAX_PAGES) * PAGE_SIZE);
	f->mem = NULL;
}

static void forget_window(struct slot *s)
{
	struct window *windows = addr_gva2hva(vm, (vm_vaddr_t)guest_windows);

	WRITE_ONCE(windows[s - slots].npages, 0);
}

static void set_slot(struct slot *s, uint32_t flags, uint64_t npages, int fd)
{
	vm_set_user_memory_region2(vm, FIRST_SLOT + (s - slots), flags, s->gpa,
				   npages * PAGE_SIZE, s->shared, fd, s->pgoff * PAGE_SIZE);
}

static void delete_slot(struct slot *s)
{
	uint64_t size = s->npages * PAGE_SIZE;

	forget_window(s);
	set_slot(s, 0, 0, 0);
	if (protected_vm)
		vm_mem_set_shared(vm, s->gpa, size);
	if (s->shared)
		munmap(s->shared, size);
	s->file = NULL;
}

static void close_file(struct file *f)
{
	pthread_mutex_lock(&noise_lock);
	close(f->fd);
	f->fd = -1;
	pthread_mutex_unlock(&noise_lock);

	/* Memslots lose their memory, if the noise has no fd of the file. */
	for (int i = 0; i < NR_SLOTS; i++) {
		if (slots[i].file == f)
			delete_slot(&slots[i]);
	}
	unmap_file(f);
}

static void do_close(void)
{
	struct file *f = random_file();

	if (!f || has_pins(f))
		return;
	log_step("file %ld: close", f - files);
	close_file(f);
}

/* Somebody else maps it, too: the child sees what the parent does. */
static void do_fork(void)
{
	struct file *f = random_mapped_file();
	int status;
	pid_t pid;

	if (!f)
		return;

	log_step("file %ld: fork", f - files);
	pid = fork();
	TEST_ASSERT(pid >= 0, __KVM_SYSCALL_ERROR("fork()", pid));
	if (!pid) {
		vmm_checks(f, 0, f->active);
		_exit(0);
	}
	TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
	TEST_ASSERT(!status, "Child ended with status 0x%x, step %lu", status, step);
}

static void do_map(void)
{
	struct file *f = random_file();
	uint64_t size, offset;
	void *mem;

	if (!f || !is_shared(f) || has_pins(f))
		return;

	if (f->mem) {
		log_step("file %ld: munmap", f - files);
		unmap_file(f);
		return;
	}

	/* Aligned to its folios or not. */
	size = min(f->npages, MAX_PAGES) * PAGE_SIZE;
	offset = one_in(3) ? PAGE_SIZE : 0;
	log_step("file %ld: mmap, %s", f - files, offset ? "shifted" : "aligned");
	mem = mmap(NULL, size + 2 * SZ_2M, PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	munmap(mem, size + 2 * SZ_2M);
	f->mem = mmap(align_ptr_up(mem, SZ_2M) + offset, size, PROT_READ | PROT_WRITE,
		      MAP_SHARED, f->fd, 0);
	TEST_ASSERT(f->mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	if (one_in(2))
		madvise(f->mem, size, MADV_HUGEPAGE);
}

/*
 * Memslots
 */

static void *random_hva(struct file *f)
{
	if (f->mem && one_in(2))
		return f->mem;
	return one_in(2) ? NULL : (void *)SZ_1M;
}

static int __set_shared_slot(struct slot *s, uint32_t flags, uint64_t pgoff)
{
	return __vm_set_user_memory_region2(vm, FIRST_SLOT + (s - slots),
					    KVM_MEM_GUEST_MEMFD | flags, s->gpa,
					    s->npages * PAGE_SIZE, s->hva, s->file->fd,
					    pgoff * PAGE_SIZE);
}

static void set_shared_slot(struct slot *s, uint32_t flags)
{
	int r = __set_shared_slot(s, flags, s->pgoff);

	TEST_ASSERT(!r, "Memslot with flags 0x%x instead of 0x%x, errno %d, step %lu, seed 0x%x",
		    flags, s->flags, errno, step, guest_random_seed);
	s->flags = flags;
}

static void bind_shared_file(struct slot *s)
{
	uint32_t flags = 0;

	if (one_in(4) && supported_slots & KVM_GUEST_MEMFD_SLOTS_LOG_DIRTY)
		flags |= KVM_MEM_LOG_DIRTY_PAGES;
	if (one_in(8) && supported_slots & KVM_GUEST_MEMFD_SLOTS_READONLY)
		flags |= KVM_MEM_READONLY;

	s->hva = random_hva(s->file);
	set_shared_slot(s, flags);
}

static void bind_private_file(struct slot *s)
{
	const uint64_t size = s->npages * PAGE_SIZE;

	s->shared = mmap(NULL, size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(s->shared != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	set_slot(s, KVM_MEM_GUEST_MEMFD, s->npages, s->file->fd);
}

/* A page of private memory can be bound once. */
static bool may_be_bound(struct file *f, uint64_t pgoff, uint64_t npages)
{
	if (is_shared(f))
		return true;

	for (int i = 0; i < NR_SLOTS; i++) {
		struct slot *s = &slots[i];

		if (s->file == f && pgoff < s->pgoff + s->npages && s->pgoff < pgoff + npages)
			return false;
	}
	return true;
}

static void do_bind(void)
{
	struct window *windows = addr_gva2hva(vm, (vm_vaddr_t)guest_windows);
	int i = rnd(NR_SLOTS);
	struct slot *s = &slots[i];
	struct file *f = random_file();
	uint64_t pgoff, npages, limit;

	if (!f || s->file)
		return;

	limit = min(f->npages, MAX_PAGES);
	pgoff = one_in(2) ? 0 : one_in(2) ? round_down(rnd(limit), NPAGES_2M) : rnd(limit);
	npages = one_in(2) ? limit - pgoff : 1 + rnd(limit - pgoff);

	if (!may_be_bound(f, pgoff, npages)) {
		int r = __vm_set_user_memory_region2(vm, FIRST_SLOT + i, KVM_MEM_GUEST_MEMFD,
						     WINDOW_GPA(i), npages * PAGE_SIZE, NULL,
						     f->fd, pgoff * PAGE_SIZE);

		TEST_ASSERT(r && errno == EEXIST, "Private memory was bound twice, step %lu", step);
		return;
	}

	memset(s, 0, sizeof(*s));
	s->file = f;
	s->pgoff = pgoff;
	s->npages = npages;
	/* Congruent to the offset in the file or not. */
	s->gpa = WINDOW_GPA(i) + (one_in(3) ? rnd(NPAGES_2M) : pgoff % NPAGES_2M) * PAGE_SIZE;

	log_step("slot %d: file %ld, pages %lu to %lu, at 0x%lx", i, f - files, pgoff,
		 pgoff + npages, s->gpa);
	if (is_shared(f))
		bind_shared_file(s);
	else
		bind_private_file(s);

	WRITE_ONCE(windows[i].gva, s->gpa);
	WRITE_ONCE(windows[i].npages, npages);
}

static void do_unbind(void)
{
	struct slot *s = random_slot();

	if (!s)
		return;
	log_step("slot %ld: delete", s - slots);
	delete_slot(s);
}

static void toggle_log_of_slot_0(void)
{
	static bool on;

	log_step("slot 0: dirty logging");
	on = !on;
	vm_mem_region_set_flags(vm, 0, on ? KVM_MEM_LOG_DIRTY_PAGES : 0);
}

static bool is_dirty(unsigned long *log, uint64_t page)
{
	return log[page / BITS_PER_LONG] & BIT(page % BITS_PER_LONG);
}

static void fetch_log(struct slot *s, unsigned long *log)
{
	const int id = FIRST_SLOT + (s - slots);

	if (ring_log) {
		collect_rings(s - slots, log);
		return;
	}
	kvm_vm_get_dirty_log(vm, id, log);
	if (manual_log)
		kvm_vm_clear_dirty_log(vm, id, log, 0, s->npages);
}

/* How often the noise's vCPU has left the guest. */
static unsigned long nr_noise_exits;

/*
 * Where the noise's vCPU was the first to write, the page is writable for others
 * before KVM has logged it.  It has by the time that this vCPU leaves the guest.
 */
static void fetch_rest_of_log(struct slot *s, unsigned long *log)
{
	static unsigned long rest[MAX_PAGES / BITS_PER_LONG];
	unsigned long exits = READ_ONCE(nr_noise_exits);

	while (READ_ONCE(nr_noise_exits) == exits)
		usleep(100);
	fetch_log(s, rest);
	for (int i = 0; i < ARRAY_SIZE(rest); i++)
		log[i] |= rest[i];
}

static bool all_logged(struct slot *s, unsigned long *log, uint64_t first, uint64_t nr,
		       uint64_t *missing)
{
	for (uint64_t i = first; i < first + nr; i++) {
		if (is_usable(s, i) && !is_dirty(log, i)) {
			*missing = i;
			return false;
		}
	}
	return true;
}

/*
 * What the guest writes must be in the log, along with what the noise writes, and
 * again when it's written again.
 */
static void check_log(struct slot *s)
{
	static unsigned long log[MAX_PAGES / BITS_PER_LONG];
	uint64_t first, nr, i;
	int round;

	if (s->flags & KVM_MEM_READONLY)
		return;

	random_range(s->npages, &first, &nr);
	fetch_log(s, log);
	for (round = 0; round < 2; round++) {
		guest_writes(s, first, nr);
		fetch_log(s, log);
		if (all_logged(s, log, first, nr, &i))
			continue;
		fetch_rest_of_log(s, log);
		TEST_ASSERT(all_logged(s, log, first, nr, &i),
			    "Page %lu of slot %ld was written and isn't logged, round %d, step %lu, seed 0x%x",
			    i, s - slots, round, step, guest_random_seed);
	}
}

/* Toggle dirty logging, of guest_memfd or of the memory that the guest runs in. */
static void do_log_dirty(void)
{
	struct slot *s = random_slot();

	if (!s || !is_shared(s->file) ||
	    !(supported_slots & KVM_GUEST_MEMFD_SLOTS_LOG_DIRTY)) {
		toggle_log_of_slot_0();
		return;
	}

	if (one_in(2)) {
		log_step("slot %ld: dirty logging", s - slots);
		set_shared_slot(s, s->flags ^ KVM_MEM_LOG_DIRTY_PAGES);
	}
	if (s->flags & KVM_MEM_LOG_DIRTY_PAGES) {
		log_step("slot %ld: check of the log", s - slots);
		check_log(s);
	}
}

static void do_convert(void)
{
	struct slot *s = random_slot();
	uint64_t first, nr, i;
	bool private;

	if (!s || !protected_vm)
		return;

	random_range(s->npages, &first, &nr);
	private = one_in(2);
	log_step("slot %ld: pages %lu to %lu become %s", s - slots, first, first + nr,
		 private ? "private" : "shared");
	if (private)
		vm_mem_set_private(vm, s->gpa + first * PAGE_SIZE, nr * PAGE_SIZE);
	else
		vm_mem_set_shared(vm, s->gpa + first * PAGE_SIZE, nr * PAGE_SIZE);
	for (i = first; i < first + nr; i++)
		s->private[i] = private;
	guest_does(s, WORK_CHECK, first, nr);
}

static void do_prefault(void)
{
	struct slot *s = random_slot();
	struct kvm_pre_fault_memory range;
	uint64_t first, nr;
	int r;

	if (!s || !kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY))
		return;

	random_range(s->npages, &first, &nr);
	log_step("slot %ld: pre-fault pages %lu to %lu", s - slots, first, first + nr);
	range = (struct kvm_pre_fault_memory) {
		.gpa = s->gpa + first * PAGE_SIZE,
		.size = nr * PAGE_SIZE,
	};
	do {
		r = __vcpu_ioctl(main_vcpu, KVM_PRE_FAULT_MEMORY, &range);
	} while (r ? errno == EINTR || errno == EAGAIN : range.size);
	/* Without TDP it's not supported, and it stops at a memory error. */
	TEST_ASSERT(!r || errno == EOPNOTSUPP || (errno == EHWPOISON && nr_poisoned),
		    "Pre-faulting failed, %s, step %lu, seed 0x%x", strerror(errno), step,
		    guest_random_seed);
}

/*
 * Contents
 */

static void do_vmm_write(void)
{
	struct file *f = random_mapped_file();
	uint64_t first, nr, i;

	if (!f)
		return;

	random_range(f->active, &first, &nr);
	log_step("file %ld: VMM writes pages %lu to %lu", f - files, first, first + nr);
	for (i = first; i < first + nr; i++) {
		if (f->poisoned[i])
			continue;
		f->stamps[i] = ++last_stamp;
		write_page(page_address(f, i), last_stamp);
	}
	check_file(f, first, nr);
}

static void do_guest_write(void)
{
	struct slot *s = random_slot();
	uint64_t first, nr;

	if (!s || s->flags & KVM_MEM_READONLY)
		return;

	random_range(s->npages, &first, &nr);
	log_step("slot %ld: guest writes pages %lu to %lu", s - slots, first, first + nr);
	guest_writes(s, first, nr);
	check_file(s->file, slot_page(s, first), nr);
}

static void do_guest_check(void)
{
	struct slot *s = random_slot();
	uint64_t first, nr;

	if (!s)
		return;

	random_range(s->npages, &first, &nr);
	log_step("slot %ld: guest checks pages %lu to %lu", s - slots, first, first + nr);
	guest_does(s, one_in(2) ? WORK_EXECUTE : WORK_CHECK, first, nr);
}

static void do_vmm_check(void)
{
	struct file *f = random_mapped_file();
	uint64_t first, nr;

	if (!f)
		return;

	random_range(f->active, &first, &nr);
	log_step("file %ld: VMM checks pages %lu to %lu", f - files, first, first + nr);
	vmm_checks(f, first, nr);
}

static int punch(struct file *f, uint64_t first, uint64_t nr)
{
	return fallocate(f->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
			 first * PAGE_SIZE, nr * PAGE_SIZE);
}

/* Nothing that somebody has written is in what's said to be a hole. */
static void do_seek(void)
{
	struct file *f = random_file();
	uint64_t first, i;
	off_t data;

	if (!f)
		return;

	first = rnd(f->active);
	data = lseek(f->fd, first * PAGE_SIZE, SEEK_DATA);
	log_step("file %ld: data behind page %lu at 0x%lx", f - files, first, data);
	TEST_ASSERT(data >= 0 || errno == ENXIO, "lseek() failed, %s, step %lu, seed 0x%x",
		    strerror(errno), step, guest_random_seed);
	for (i = first; i < f->active && (data < 0 || i < data / PAGE_SIZE); i++)
		TEST_ASSERT(!f->stamps[i] || f->stamps[i] == UNKNOWN,
			    "Page %lu of file %ld has 0x%lx and is in a hole, step %lu, seed 0x%x",
			    i, f - files, f->stamps[i], step, guest_random_seed);
}

static bool has_poison(struct file *f, uint64_t first, uint64_t nr)
{
	for (uint64_t i = first; i < first + nr; i++) {
		if (f->poisoned[i])
			return true;
	}
	return false;
}

static void forget_pins(struct file *f, uint64_t first, uint64_t nr)
{
	for (int i = 0; i < NR_PINS; i++) {
		if (pins[i].file == f && pins[i].page >= first && pins[i].page < first + nr)
			pins[i].stale = true;
	}
}

static void do_punch(void)
{
	struct file *f = random_file();
	uint64_t first, nr, i;
	bool poison;
	int r;

	if (!f)
		return;

	random_range(f->active, &first, &nr);
	log_step("file %ld: hole at pages %lu to %lu", f - files, first, first + nr);
	poison = has_poison(f, first, nr);
	r = punch(f, first, nr);
	/* Bad pages can't be replaced under those who hold on to their folio. */
	TEST_ASSERT(!r || (poison && (errno == EBUSY || errno == ENOMEM)),
		    "Punching a hole failed, %s, step %lu, seed 0x%x", strerror(errno), step,
		    guest_random_seed);

	forget_pins(f, first, nr);
	for (i = first; i < first + nr; i++) {
		if (!r)
			f->poisoned[i] = false;
		f->stamps[i] = r ? UNKNOWN : 0;
	}
	/* The neighbours, too. */
	first = first < 4 ? 0 : first - 4;
	check_file(f, first, min(nr + 8, f->active - first));
}

static void do_populate(void)
{
	struct file *f = random_file();
	uint64_t first, nr;
	int r;

	if (!f)
		return;

	random_range(f->npages, &first, &nr);
	/* 1 GiB takes a while. */
	if (!one_in(10))
		nr = min(nr, MAX_PAGES);
	log_step("file %ld: populate pages %lu to %lu", f - files, first, first + nr);
	/* The end of a ring interrupts its task, like a signal. */
	do {
		r = fallocate(f->fd, FALLOC_FL_KEEP_SIZE, first * PAGE_SIZE, nr * PAGE_SIZE);
	} while (r && errno == EINTR);
	TEST_ASSERT(!r, "fallocate() failed, %s, step %lu, seed 0x%x", strerror(errno), step,
		    guest_random_seed);
}

/*
 * Pins
 */

static bool pin_by_vmsplice(struct pin *pin)
{
	struct iovec iov = { page_address(pin->file, pin->page), PAGE_SIZE };

	pin->uring = -1;
	TEST_ASSERT(!pipe(pin->pipe), __KVM_SYSCALL_ERROR("pipe()", -1));
	if (vmsplice(pin->pipe[1], &iov, 1, 0) == PAGE_SIZE)
		return true;
	close(pin->pipe[0]);
	close(pin->pipe[1]);
	return false;
}

static bool pin_by_uring(struct pin *pin)
{
	struct iovec iov = { page_address(pin->file, pin->page), PAGE_SIZE };
	struct io_uring_params params = {};

	pin->uring = syscall(__NR_io_uring_setup, 1, &params);
	if (pin->uring < 0)
		return false;
	if (!syscall(__NR_io_uring_register, pin->uring, IORING_REGISTER_BUFFERS, &iov, 1))
		return true;
	close(pin->uring);
	return false;
}

static void do_pin(void)
{
	struct pin *pin = &pins[rnd(NR_PINS)];
	struct file *f = random_mapped_file();
	bool pinned;

	if (!f || pin->file)
		return;

	pin->page = rnd(f->active);
	if (f->poisoned[pin->page] || f->stamps[pin->page] == UNKNOWN)
		return;

	pin->file = f;
	pin->stale = false;
	pinned = one_in(2) ? pin_by_vmsplice(pin) : pin_by_uring(pin);
	log_step("file %ld: pin page %lu%s", f - files, pin->page, pinned ? "" : ", failed");
	if (!pinned)
		pin->file = NULL;
}

/* The pipe has what the file has now, not what it had when the page was pinned. */
static void check_pipe(struct pin *pin)
{
	uint64_t seen, stamp = pin->file->stamps[pin->page];

	if (pin->stale || pin->file->poisoned[pin->page])
		return;

	TEST_ASSERT_EQ(read(pin->pipe[0], &seen, sizeof(seen)), sizeof(seen));
	TEST_ASSERT(seen == stamp,
		    "Pinned page %lu of file %ld has 0x%lx, expected 0x%lx, step %lu, seed 0x%x",
		    pin->page, pin->file - files, seen, stamp, step, guest_random_seed);
}

static void do_unpin(void)
{
	struct pin *pin = &pins[rnd(NR_PINS)];

	if (!pin->file)
		return;

	log_step("file %ld: unpin page %lu", pin->file - files, pin->page);
	if (pin->uring >= 0) {
		close(pin->uring);
	} else {
		check_pipe(pin);
		close(pin->pipe[0]);
		close(pin->pipe[1]);
	}
	pin->file = NULL;
}

/*
 * Memory errors
 */

static struct slot *slot_of_page(struct file *f, uint64_t page)
{
	for (int i = 0; i < NR_SLOTS; i++) {
		struct slot *s = &slots[i];

		if (s->file == f && page >= s->pgoff && page < s->pgoff + s->npages)
			return s;
	}
	return NULL;
}

static void guest_touches_poison(struct slot *s, uint64_t i)
{
	struct work *w = addr_gva2hva(vm, (vm_vaddr_t)&guest_work);
	struct kvm_run *run = main_vcpu->run;
	int r;

	w->op = WORK_CHECK;
	w->gva = s->gpa + i * PAGE_SIZE;
	w->nr = 1;
	w->stamps[0] = 0;
	r = run_main_vcpu();
	TEST_ASSERT(r == -1 && errno == EHWPOISON && run->exit_reason == KVM_EXIT_MEMORY_FAULT &&
		    run->memory_fault.gpa == s->gpa + i * PAGE_SIZE,
		    "KVM_RUN should fail with EHWPOISON, r %d, errno %d, exit reason %s, step %lu, seed 0x%x",
		    r, errno, exit_reason_str(run->exit_reason), step, guest_random_seed);
	gmem_vcpu_reset(main_vcpu, &main_regs);
}

/* A folio of 1 GiB is lost as a whole, so have no more than one. */
static bool may_be_lost(struct file *f)
{
	static bool lost;

	if (!gmem_fdinfo(f->fd, "gmem_1g"))
		return true;
	if (lost)
		return false;
	lost = true;
	return true;
}

static void do_poison(void)
{
	struct file *f = random_mapped_file();
	struct slot *s;
	uint64_t page;
	int err;

	if (!f || nr_poisoned >= MAX_POISON)
		return;

	page = rnd(f->active);
	if (f->poisoned[page] || !may_be_lost(f))
		return;

	err = gmem_inject_memory_error(page_address(f, page));
	log_step("file %ld: memory error in page %lu, %s", f - files, page, strerror(err));
	if (err == EINVAL || err == EPERM) {
		nr_poisoned = MAX_POISON;
		return;
	}
	/* EBUSY: there's somebody else, but mm has told all who use the page. */
	TEST_ASSERT(!err || err == EBUSY || err == EHWPOISON,
		    "madvise(MADV_HWPOISON) failed, %s", strerror(err));
	nr_poisoned++;
	f->poisoned[page] = true;
	forget_pins(f, page, 1);

	s = slot_of_page(f, page);
	if (s)
		guest_touches_poison(s, page - s->pgoff);
	TEST_ASSERT_EQ(gmem_sigbus_code(page_address(f, page), false), BUS_MCEERR_AR);
}

/*
 * What mm does to memory
 */

static void do_advise(void)
{
	static const int advices[] = {
		MADV_COLD, MADV_PAGEOUT, MADV_COLLAPSE, MADV_DONTNEED, MADV_HUGEPAGE,
		MADV_NOHUGEPAGE, MADV_POPULATE_READ, MADV_WILLNEED,
	};
	struct file *f = random_mapped_file();
	uint64_t first, nr;
	int advice;

	if (!f)
		return;

	random_range(f->active, &first, &nr);
	advice = advices[rnd(ARRAY_SIZE(advices))];
	log_step("file %ld: madvise(%d) pages %lu to %lu", f - files, advice, first, first + nr);
	madvise(page_address(f, first), nr * PAGE_SIZE, advice);
}

static void do_protect(void)
{
	struct file *f = random_mapped_file();
	uint64_t first, nr;
	void *mem;

	if (!f)
		return;

	random_range(f->active, &first, &nr);
	mem = page_address(f, first);
	log_step("file %ld: mprotect() pages %lu to %lu", f - files, first, first + nr);
	mprotect(mem, nr * PAGE_SIZE, PROT_NONE);
	for (int i = 0; i < NR_SLOTS; i++) {
		if (slots[i].file == f)
			guest_does(&slots[i], WORK_CHECK, 0, slots[i].npages);
	}
	mprotect(mem, nr * PAGE_SIZE, PROT_READ | PROT_WRITE);
}

static void do_mbind(void)
{
	static const int modes[] = { MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE };
	struct file *f = random_mapped_file();
	uint64_t first, nr;
	unsigned long mask;
	int mode;

	if (!f)
		return;

	random_range(f->active, &first, &nr);
	mode = modes[rnd(ARRAY_SIZE(modes))];
	mask = mode == MPOL_DEFAULT ? 0 : 1 + rnd(3);
	log_step("file %ld: mbind(%d, 0x%lx) pages %lu to %lu", f - files, mode, mask, first,
		 first + nr);
	mbind(page_address(f, first), nr * PAGE_SIZE, mode, &mask, 8 * sizeof(mask),
	      one_in(2) ? MPOL_MF_MOVE : 0);
}

static void do_migrate(void)
{
	unsigned long from = BIT(rnd(2)), to = from ^ 3;

	log_step("migrate_pages() from node mask 0x%lx", from);
	migrate_pages(0, 8 * sizeof(from), &from, &to);
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	if (fd < 0)
		return;
	/* Not every kernel has it, and it's worth as much if it fails. */
	if (write(fd, text, strlen(text)) < 0)
		log_step("%s: %s", path, strerror(errno));
	close(fd);
}

static void do_mm(void)
{
	static const struct {
		const char *path, *text;
	} knobs[] = {
		{ "/proc/sys/vm/compact_memory", "1" },
		{ "/proc/sys/vm/drop_caches", "3" },
		{ "/sys/kernel/debug/split_huge_pages", "1" },
	};
	int i = rnd(ARRAY_SIZE(knobs));

	/* They look at all memory of the machine. */
	if (!one_in(5))
		return;
	log_step("%s", knobs[i].path);
	write_file(knobs[i].path, knobs[i].text);
}

#define CGROUP	"/sys/fs/cgroup/guest_memfd_stress"

/* Populate on the account of somebody who can't afford it, and may die from it. */
static void do_memcg(void)
{
	struct file *f = random_file();
	uint64_t first, nr;
	int status;
	pid_t pid;

	if (!f)
		return;

	write_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	mkdir(CGROUP, 0700);
	if (access(CGROUP "/memory.max", W_OK))
		return;
	write_file(CGROUP "/memory.max", one_in(2) ? "1M" : "6M");

	random_range(min(f->npages, MAX_PAGES), &first, &nr);
	log_step("file %ld: populate pages %lu to %lu in a memcg", f - files, first, first + nr);
	pid = fork();
	TEST_ASSERT(pid >= 0, __KVM_SYSCALL_ERROR("fork()", pid));
	if (!pid) {
		write_file(CGROUP "/cgroup.procs", "0");
		status = fallocate(f->fd, FALLOC_FL_KEEP_SIZE, first * PAGE_SIZE, nr * PAGE_SIZE);
		_exit(status && errno != ENOMEM && errno != EINTR);
	}
	TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
	TEST_ASSERT(!status || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL),
		    "Child ended with status 0x%x, step %lu, seed 0x%x", status, step,
		    guest_random_seed);
	check_file(f, 0, f->active);
}

/*
 * What KVM has to refuse
 */

static void assert_refused(int r, int err, const char *what)
{
	TEST_ASSERT(r < 0 && errno == err,
		    "%s: r %d, errno %d, expected errno %d, step %lu, seed 0x%x",
		    what, r, errno, err, step, guest_random_seed);
}

static void refuse_files(void)
{
	assert_refused(__vm_create_guest_memfd(vm, 0, 0), EINVAL, "Size of zero");
	assert_refused(__vm_create_guest_memfd(vm, PAGE_SIZE + 1, 0), EINVAL, "Odd size");
	assert_refused(__vm_create_guest_memfd(vm, PAGE_SIZE, BIT_ULL(40)), EINVAL, "Unknown flag");
}

static void refuse_ranges(struct file *f)
{
	assert_refused(fallocate(f->fd, FALLOC_FL_KEEP_SIZE, 1, PAGE_SIZE), EINVAL, "Odd offset");
	assert_refused(fallocate(f->fd, FALLOC_FL_KEEP_SIZE, f->npages * PAGE_SIZE, PAGE_SIZE),
		       EINVAL, "Offset at the end");
	assert_refused(fallocate(f->fd, 0, 0, PAGE_SIZE), EOPNOTSUPP, "Mode of zero");
	TEST_ASSERT(mmap(NULL, PAGE_SIZE, PROT_READ, MAP_PRIVATE, f->fd, 0) == MAP_FAILED,
		    "A private mapping was made");
	assert_refused(ftruncate(f->fd, 0), EINVAL, "Truncation");
}

static void refuse_slots(struct file *f)
{
	const uint64_t size = f->npages * PAGE_SIZE;
	struct slot *s = random_slot();

	assert_refused(__vm_set_user_memory_region2(vm, FIRST_SLOT + NR_SLOTS, KVM_MEM_GUEST_MEMFD,
						    WINDOW_GPA(NR_SLOTS), size, NULL, f->fd,
						    PAGE_SIZE), EINVAL, "Range past the end");
	assert_refused(__vm_set_user_memory_region2(vm, FIRST_SLOT + NR_SLOTS, KVM_MEM_GUEST_MEMFD,
						    WINDOW_GPA(NR_SLOTS), size, NULL, vm->fd, 0),
		       EINVAL, "Not a guest_memfd");
	if (!s)
		return;
	assert_refused(__vm_set_user_memory_region2(vm, FIRST_SLOT + NR_SLOTS, KVM_MEM_GUEST_MEMFD,
						    s->gpa, PAGE_SIZE, NULL, s->file->fd,
						    slot_page(s, 0) * PAGE_SIZE),
		       EEXIST, "Overlapping memslots");
	if (!is_shared(s->file))
		return;
	assert_refused(__set_shared_slot(s, s->flags ^ KVM_MEM_READONLY, s->pgoff), EINVAL,
		       "Another kind of memslot");
	assert_refused(__set_shared_slot(s, s->flags ^ KVM_MEM_LOG_DIRTY_PAGES, s->pgoff + 1),
		       EINVAL, "Another offset");
}

static void do_refused(void)
{
	struct file *f = random_file();

	log_step("bad arguments");
	refuse_files();
	if (f) {
		refuse_ranges(f);
		refuse_slots(f);
	}
}

/*
 * The noise
 */

static bool noise_ends;

static void *noise_vcpu_thread(void *arg)
{
	while (!READ_ONCE(noise_ends)) {
		int r = __vcpu_run(noise_vcpu);

		WRITE_ONCE(nr_noise_exits, nr_noise_exits + 1);

		/* A memslot may be gone, a page may be bad, also one of a ROM. */
		if (!r && noise_vcpu->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL)
			collect_rings(0, NULL);
		else if (r || (noise_vcpu->run->exit_reason != KVM_EXIT_IO &&
			       noise_vcpu->run->exit_reason != KVM_EXIT_MMIO))
			gmem_vcpu_reset(noise_vcpu, &noise_regs);
	}
	return NULL;
}

static uint32_t noise_rnd(struct guest_random_state *state, uint32_t limit)
{
	return guest_random_u32(state) % limit;
}

/* An fd for @f, which may be closed any time. */
static int noise_open(struct file *f, struct file *copy)
{
	int fd = -1;

	pthread_mutex_lock(&noise_lock);
	if (f->fd >= 0) {
		copy->flags = f->flags;
		copy->npages = min(f->npages, MAX_PAGES);
		copy->active = f->active;
		memcpy(copy->poisoned, f->poisoned, sizeof(copy->poisoned));
		fd = dup(f->fd);
	}
	pthread_mutex_unlock(&noise_lock);
	return fd;
}

/* Fault a page in, hold on to it for a moment, let go. */
static void noise_touch(struct guest_random_state *state, struct file *f)
{
	uint64_t page = noise_rnd(state, f->npages);
	struct pin pin = { .file = f, .page = page };

	/* Each access to a bad page is worth a line in the kernel's log. */
	if (f->poisoned[page] && noise_rnd(state, 64))
		return;

	gmem_sigbus_code(page_address(f, page) + NOISE_WORD, guest_random_bool(state));
	if (noise_rnd(state, 4) || !pin_by_vmsplice(&pin))
		return;
	usleep(noise_rnd(state, 200));
	close(pin.pipe[0]);
	close(pin.pipe[1]);
}

static void noise_unmap(struct guest_random_state *state, struct file *f)
{
	uint64_t page = noise_rnd(state, f->npages);

	madvise(page_address(f, page), min(f->npages - page, 64ul) * PAGE_SIZE, MADV_DONTNEED);
}

/* Nobody cares about the last pages, and they share folios with others. */
static void noise_punch(struct guest_random_state *state, struct file *f)
{
	uint64_t page;

	if (f->active == f->npages)
		return;
	page = f->active + noise_rnd(state, f->npages - f->active);
	if (punch(f, page, 1 + noise_rnd(state, f->npages - page)))
		TEST_ASSERT(errno == EBUSY, __KVM_SYSCALL_ERROR("fallocate()", -1));
}

static void noise_populate(struct guest_random_state *state, struct file *f)
{
	fallocate(f->fd, FALLOC_FL_KEEP_SIZE,
		  noise_rnd(state, f->npages) * PAGE_SIZE, PAGE_SIZE);
}

static void noise_round(struct guest_random_state *state, struct file *f)
{
	for (int i = 0; i < 50; i++) {
		if (f->mem && noise_rnd(state, 2))
			noise_touch(state, f);
		else if (f->mem && noise_rnd(state, 3))
			noise_unmap(state, f);
		else if (noise_rnd(state, 3))
			noise_punch(state, f);
		else if (noise_rnd(state, 4))
			noise_populate(state, f);
		else
			gmem_fdinfo(f->fd, "gmem_4k");
	}
}

static void *noise_vmm_thread(void *arg)
{
	struct guest_random_state state = new_guest_random_state(guest_random_seed + 1);
	struct file *copy = calloc(1, sizeof(*copy));
	size_t size;

	while (!READ_ONCE(noise_ends)) {
		copy->fd = noise_open(&files[noise_rnd(&state, NR_FILES)], copy);
		if (copy->fd < 0) {
			usleep(100);
			continue;
		}
		size = copy->npages * PAGE_SIZE;
		copy->mem = is_shared(copy) ? gmem_mmap(copy->fd, size, 0) : NULL;
		noise_round(&state, copy);
		if (copy->mem)
			munmap(copy->mem, size);
		close(copy->fd);
	}
	free(copy);
	return NULL;
}

static pthread_t noise_threads[2];

static void start_noise(void)
{
	noise_ends = false;
	pthread_create(&noise_threads[0], NULL, noise_vcpu_thread, NULL);
	pthread_create(&noise_threads[1], NULL, noise_vmm_thread, NULL);
}

static void stop_noise(void)
{
	WRITE_ONCE(noise_ends, true);
	for (int i = 0; i < ARRAY_SIZE(noise_threads); i++)
		pthread_join(noise_threads[i], NULL);
}

/*
 * The VM
 */

static void create_machine(void)
{
	const struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = protected_vm ? KVM_X86_SW_PROTECTED_VM : VM_TYPE_DEFAULT,
	};
	const int level = kvm_cpu_has(X86_FEATURE_GBPAGES) ? PG_LEVEL_1G : PG_LEVEL_2M;
	int i;

	vm = __vm_create(shape, 2, 4 * NPAGES_2M);
	supported_flags = vm_check_cap(vm, KVM_CAP_GUEST_MEMFD_FLAGS);
	supported_slots = vm_check_cap(vm, KVM_CAP_GUEST_MEMFD_SLOTS);
	ring_log = one_in(3) && vm_check_cap(vm, KVM_CAP_DIRTY_LOG_RING_ACQ_REL) >= RING_SIZE;
	if (ring_log)
		vm_enable_dirty_ring(vm, RING_SIZE);
	memset(ring_logs, 0, sizeof(ring_logs));
	memset(nr_collected, 0, sizeof(nr_collected));
	manual_log = !ring_log && one_in(2) &&
		     vm_check_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	if (manual_log)
		vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			      one_in(2) ? KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE :
			      vm_check_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
	main_vcpu = vm_vcpu_add(vm, MAIN_VCPU, guest_main);
	noise_vcpu = vm_vcpu_add(vm, NOISE_VCPU, guest_noise);
	vcpu_regs_get(main_vcpu, &main_regs);
	vcpu_regs_get(noise_vcpu, &noise_regs);

	for (i = 0; i < NR_SLOTS; i++)
		virt_map_level(vm, WINDOW_GPA(i), WINDOW_GPA(i), SZ_1G, level);
	guest_noise_seed = guest_random_seed;
	sync_global_to_guest(vm, guest_noise_seed);

	for (i = 0; i < NR_FILES; i++)
		files[i].fd = -1;
	start_noise();
}

/* Let go of files and VM in either order. */
static void free_machine(void)
{
	bool vm_first = one_in(2);
	int i;

	log_step("end of this VM");
	stop_noise();
	check_all();
	for (i = 0; i < NR_PINS; i++) {
		if (!pins[i].file)
			continue;
		if (pins[i].uring >= 0) {
			close(pins[i].uring);
		} else {
			close(pins[i].pipe[0]);
			close(pins[i].pipe[1]);
		}
		pins[i].file = NULL;
	}
	if (vm_first) {
		for (i = 0; i < NR_SLOTS; i++) {
			if (slots[i].shared)
				munmap(slots[i].shared, slots[i].npages * PAGE_SIZE);
		}
		kvm_vm_free(vm);
		memset(slots, 0, sizeof(slots));
	}
	for (i = 0; i < NR_FILES; i++) {
		if (files[i].fd >= 0)
			close_file(&files[i]);
	}
	if (!vm_first)
		kvm_vm_free(vm);
}

static const struct {
	void (*do_it)(void);
	int weight;
} steps[] = {
	{ do_create, 20 },
	{ do_close, 2 },
	{ do_map, 8 },
	{ do_fork, 2 },
	{ do_bind, 30 },
	{ do_unbind, 8 },
	{ do_log_dirty, 12 },
	{ do_convert, 20 },
	{ do_prefault, 5 },
	{ do_vmm_write, 30 },
	{ do_guest_write, 40 },
	{ do_guest_check, 20 },
	{ do_vmm_check, 10 },
	{ do_punch, 40 },
	{ do_populate, 8 },
	{ do_seek, 5 },
	{ do_pin, 8 },
	{ do_unpin, 6 },
	{ do_poison, 1 },
	{ do_advise, 10 },
	{ do_protect, 2 },
	{ do_mbind, 5 },
	{ do_migrate, 1 },
	{ do_mm, 1 },
	{ do_memcg, 1 },
	{ do_refused, 3 },
	{ check_all, 5 },
};

static void take_step(void)
{
	int i, total = 0, at;

	for (i = 0; i < ARRAY_SIZE(steps); i++)
		total += steps[i].weight;
	at = rnd(total);
	for (i = 0; at >= steps[i].weight; i++)
		at -= steps[i].weight;
	steps[i].do_it();
	step++;
}

#define STEPS_PER_VM	1000

static void help(const char *name)
{
	printf("usage: %s [-h] [-s SEED] [-t SECONDS] [-n STEPS] [-v]\n", name);
	printf(" -s: Take the steps of this seed (default: another one each time).\n");
	printf(" -t: For how long (default: 20).\n");
	printf(" -n: Stop after so many steps.\n");
	printf(" -v: Print each step.\n");
	exit(0);
}

int main(int argc, char *argv[])
{
	uint64_t max_steps = UINT64_MAX;
	int seconds = 20, opt, nr_vms = 0;
	struct timespec start;
	bool have_protected;

	guest_random_seed = time(NULL) ^ getpid() << 16;
	while ((opt = getopt(argc, argv, "hs:t:n:v")) != -1) {
		switch (opt) {
		case 's':
			guest_random_seed = strtoul(optarg, NULL, 0);
			break;
		case 't':
			seconds = atoi_positive("Seconds", optarg);
			break;
		case 'n':
			max_steps = atoi_positive("Steps", optarg);
			break;
		case 'v':
			verbose = true;
			break;
		default:
			help(argv[0]);
		}
	}

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD));
	TEST_REQUIRE((kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & GMEM_SHARED) == GMEM_SHARED);
	have_protected = kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM);

	pr_info("Seed: 0x%x\n", guest_random_seed);
	rng = new_guest_random_state(guest_random_seed);
	clock_gettime(CLOCK_MONOTONIC, &start);

	while (step < max_steps && timespec_elapsed(start).tv_sec < seconds) {
		protected_vm = have_protected && one_in(4);
		create_machine();
		do {
			take_step();
		} while (step % STEPS_PER_VM && step < max_steps &&
			 timespec_elapsed(start).tv_sec < seconds);
		free_machine();
		nr_vms++;
	}

	rmdir(CGROUP);
	pr_info("%lu steps, %lu pages written, %d VMs, %d memory errors\n", step, last_stamp,
		nr_vms, nr_poisoned);
	return 0;
}
