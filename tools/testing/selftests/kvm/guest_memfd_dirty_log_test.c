// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty logging of memory that is guest_memfd, with userspace_addr 0: the log has
 * exactly what was written, by the guest or by KVM itself, in all modes of logging,
 * mappings are of 4 KiB meanwhile, and are as big as before afterwards.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <asm/barrier.h>
#include <asm/kvm_para.h>
#include <linux/bitmap.h>
#include <linux/bitops.h>
#include <linux/falloc.h>
#include <linux/sizes.h>
#include <sys/mman.h>

#include "guest_memfd.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define GMEM_SHARED	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)

#define TEST_GPA	(4ULL << 30)
#define TEST_SLOT	10
#define ALIAS_GPA	(16ULL << 30)
#define ALIAS_SLOT	11

#define RING_COUNT	65536

enum log_mode {
	/* Fetching the bitmap protects what it has. */
	LOG_BITMAP,
	/* Clearing bits does, the bitmap is empty at first. */
	LOG_MANUAL,
	/* The same, but the bitmap is full at first. */
	LOG_INITIALLY_SET,
	LOG_RING,
	NR_LOG_MODES,
};

static const char * const mode_names[] = {
	"bitmap", "manual protect", "initially set", "dirty ring",
};

struct machine {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	enum log_mode mode;
	int level;
	int fd;
	uint64_t npages;
	void *mem;

	/* What the log had when it was fetched last. */
	unsigned long *dirty;
	uint32_t ring_index;
	/* What each page's first word should be. */
	uint64_t *model;
	uint64_t serial;
};

static bool mode_is_possible(enum log_mode mode)
{
	if (mode == LOG_RING)
		return kvm_has_cap(KVM_CAP_DIRTY_LOG_RING);

	return mode == LOG_BITMAP ||
	       kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & KVM_DIRTY_LOG_INITIALLY_SET;
}

static int __set_log(struct machine *m, bool log)
{
	return __vm_set_user_memory_region2(m->vm, TEST_SLOT,
					    KVM_MEM_GUEST_MEMFD |
					    (log ? KVM_MEM_LOG_DIRTY_PAGES : 0),
					    TEST_GPA, m->npages * PAGE_SIZE, NULL,
					    m->fd, 0);
}

static void set_log(struct machine *m, bool log)
{
	int ret = __set_log(m, log);

	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_SET_USER_MEMORY_REGION2, ret));
}

static void delete_slot(struct machine *m, uint32_t slot)
{
	vm_set_user_memory_region2(m->vm, slot, 0, 0, 0, NULL, 0, 0);
}

static void create_machine(struct machine *m, enum log_mode mode, uint64_t flags,
			   uint64_t size, int level)
{
	memset(m, 0, sizeof(*m));
	m->mode = mode;
	m->level = level;
	m->npages = size / PAGE_SIZE;

	m->vm = __vm_create(VM_SHAPE_DEFAULT, 1, 4096);
	if (mode == LOG_MANUAL)
		vm_enable_cap(m->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			      KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	if (mode == LOG_INITIALLY_SET)
		vm_enable_cap(m->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			      KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
			      KVM_DIRTY_LOG_INITIALLY_SET);
	if (mode == LOG_RING)
		vm_enable_dirty_ring(m->vm, RING_COUNT * sizeof(struct kvm_dirty_gfn));

	m->vcpu = vm_vcpu_add(m->vm, 0, gmem_guest_code);
	vcpu_args_set(m->vcpu, 1, 0ul);
	if (mode == LOG_RING)
		vcpu_map_dirty_ring(m->vcpu);

	/* Deleting a memslot is to zap that memslot's SPTEs only. */
	vm_enable_cap(m->vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);

	/* Without TDP, what the guest maps limits what KVM does. */
	gmem_map_in_guest(m->vm, TEST_GPA, size, max(level, PG_LEVEL_2M));

	m->fd = vm_create_guest_memfd(m->vm, size, GMEM_SHARED | flags);
	m->mem = gmem_mmap(m->fd, size, 0);
	m->dirty = bitmap_zalloc(m->npages);
	m->model = calloc(m->npages, sizeof(*m->model));
	TEST_ASSERT(m->dirty && m->model, "No memory for %lu pages", m->npages);
}

static void free_machine(struct machine *m)
{
	kvm_vm_free(m->vm);
	munmap(m->mem, m->npages * PAGE_SIZE);
	close(m->fd);
	free(m->dirty);
	free(m->model);
}

static void fetch_ring(struct machine *m)
{
	struct kvm_dirty_gfn *ring = vcpu_map_dirty_ring(m->vcpu), *entry;
	uint32_t fetched = 0, reset;

	bitmap_zero(m->dirty, m->npages);
	for (;; m->ring_index++, fetched++) {
		entry = &ring[m->ring_index % RING_COUNT];
		/* KVM sets the flag when the rest of the entry is there. */
		if (smp_load_acquire(&entry->flags) != KVM_DIRTY_GFN_F_DIRTY)
			break;

		TEST_ASSERT_EQ(entry->slot, TEST_SLOT);
		TEST_ASSERT(entry->offset < m->npages, "Page 0x%llx of 0x%lx",
			    entry->offset, m->npages);
		__set_bit(entry->offset, m->dirty);
		/* From here on the entry is KVM's again. */
		smp_store_release(&entry->flags, KVM_DIRTY_GFN_F_RESET);
	}

	reset = kvm_vm_reset_dirty_ring(m->vm);
	TEST_ASSERT_EQ(reset, fetched);
}

/* Fetch the log, and have it start over. */
static void fetch_log(struct machine *m)
{
	if (m->mode == LOG_RING) {
		fetch_ring(m);
		return;
	}

	kvm_vm_get_dirty_log(m->vm, TEST_SLOT, m->dirty);
	if (m->mode != LOG_BITMAP)
		kvm_vm_clear_dirty_log(m->vm, TEST_SLOT, m->dirty, 0, m->npages);
}

/* The log is to have the pages in @expected, none if that's NULL, and no other. */
static void expect_log(struct machine *m, const unsigned long *expected, const char *when)
{
	uint64_t i;

	fetch_log(m);
	for (i = 0; i < m->npages; i++) {
		bool dirty = test_bit(i, m->dirty);

		TEST_ASSERT(dirty == (expected && test_bit(i, expected)),
			    "Page %lu of %lu should %sbe dirty %s, logging by %s", i,
			    m->npages, dirty ? "not " : "", when, mode_names[m->mode]);
	}
}

static void set_all(unsigned long *pages, uint64_t npages)
{
	for (uint64_t i = 0; i < npages; i++)
		__set_bit(i, pages);
}

/* Logging has just begun. */
static void expect_first_log(struct machine *m)
{
	unsigned long *all = bitmap_zalloc(m->npages);

	set_all(all, m->npages);
	expect_log(m, m->mode == LOG_INITIALLY_SET ? all : NULL, "at first");
	free(all);
}

#define guest_does(m, ...)						\
	gmem_vcpu_run((m)->vcpu, &(struct gmem_work){ .stride = PAGE_SIZE, __VA_ARGS__ })

static void guest_writes(struct machine *m, uint64_t page)
{
	m->model[page] = gmem_tag(page) + ++m->serial;
	guest_does(m, .op = GMEM_SET, .gva = TEST_GPA + page * PAGE_SIZE, .nr = 1,
		   .val = m->model[page]);
}

static void guest_writes_all(struct machine *m)
{
	m->serial++;
	for (uint64_t i = 0; i < m->npages; i++)
		m->model[i] = gmem_tag(i) + m->serial;
	guest_does(m, .op = GMEM_SET, .gva = TEST_GPA, .nr = m->npages,
		   .val = gmem_tag(0) + m->serial, .step = GMEM_TAG_STEP);
}

/* One pass of the guest, which reads a word of each page. */
static void guest_checks_all(struct machine *m)
{
	uint64_t first = 0, end;

	while (first < m->npages) {
		/* As far as words go up by the same from page to page. */
		for (end = first + 1; end < m->npages; end++) {
			if (m->model[end] != m->model[first] +
					     (end - first) * GMEM_TAG_STEP)
				break;
		}
		guest_does(m, .op = GMEM_CHECK, .gva = TEST_GPA + first * PAGE_SIZE,
			   .nr = end - first, .val = m->model[first],
			   .step = GMEM_TAG_STEP);
		first = end;
	}
}

static void vmm_checks_all(struct machine *m)
{
	for (uint64_t i = 0; i < m->npages; i++) {
		uint64_t seen = *(uint64_t *)(m->mem + i * PAGE_SIZE);

		TEST_ASSERT(seen == m->model[i], "VMM sees 0x%lx in page %lu, expected 0x%lx",
			    seen, i, m->model[i]);
	}
}

/* Huge mappings there are, in pages: the memory of the rest of the VM has none. */
static uint64_t huge_pages_mapped(struct machine *m)
{
	return (vm_get_stat(m->vm, "pages_2m") << 9) + (vm_get_stat(m->vm, "pages_1g") << 18);
}

static void expect_no_huge(struct machine *m, const char *when)
{
	TEST_ASSERT(!huge_pages_mapped(m), "%lu pages are mapped by huge SPTEs %s",
		    huge_pages_mapped(m), when);
}

/* @lost pages are not in folios of the size that the test is about. */
static void expect_huge(struct machine *m, uint64_t lost, const char *when)
{
	const char *stat = m->level == PG_LEVEL_1G ? "pages_1g" : "pages_2m";
	uint64_t pages = m->level == PG_LEVEL_4K ? 0 : vm_get_stat(m->vm, stat) *
			 (PG_LEVEL_SIZE(m->level) / PAGE_SIZE);

	if (m->level == PG_LEVEL_4K)
		expect_no_huge(m, when);
	else
		TEST_ASSERT(pages == m->npages - lost,
			    "%lu of %lu pages are mapped with the size of their folio %s",
			    pages, m->npages - lost, when);
}

/* Write to a few pages, neighbours and both ends included, a different set each time. */
static void write_some(struct machine *m, unsigned long *pages, int round)
{
	const uint64_t some[] = {
		0, 1, 510 + round, 511 + round, m->npages / 2 + 7 * round,
		m->npages - 2 - round, m->npages - 1,
	};

	bitmap_zero(pages, m->npages);
	for (int i = 0; i < ARRAY_SIZE(some); i++) {
		guest_writes(m, some[i]);
		TEST_ASSERT(!test_bit(some[i], pages), "Page %lu is there twice", some[i]);
		__set_bit(some[i], pages);
	}
}

static void punch(struct machine *m, uint64_t page, uint64_t nr)
{
	int ret = fallocate(m->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
			    page * PAGE_SIZE, nr * PAGE_SIZE);

	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("fallocate()", ret));
	memset(&m->model[page], 0, nr * sizeof(*m->model));
}

/* KVM writes the wall clock when told where it is. */
static void kvm_writes(struct machine *m, uint64_t page)
{
	vcpu_set_msr(m->vcpu, MSR_KVM_WALL_CLOCK_NEW, TEST_GPA + page * PAGE_SIZE);
	m->model[page] = *(uint64_t *)(m->mem + page * PAGE_SIZE);
	TEST_ASSERT(m->model[page] & 0xffffffff, "KVM should have written a version");
}

/* Logging is switched on and off with everything mapped, as big as it goes. */
static void test_toggle(struct machine *m)
{
	unsigned long *pages = bitmap_zalloc(m->npages);
	int cycle, round;

	set_log(m, false);
	guest_writes_all(m);
	expect_huge(m, 0, "before logging");

	for (cycle = 0; cycle < 2; cycle++) {
		set_log(m, true);
		expect_first_log(m);

		for (round = 0; round < 3; round++) {
			write_some(m, pages, round + 3 * cycle);
			expect_log(m, pages, "after writing to 7 pages");
			expect_log(m, NULL, "when nothing was written");
		}

		bitmap_zero(pages, m->npages);
		__set_bit(77, pages);
		kvm_writes(m, 77);
		expect_log(m, pages, "after KVM has written");

		/* The ring has an end. */
		if (m->npages < RING_COUNT / 2) {
			guest_writes_all(m);
			set_all(pages, m->npages);
			expect_log(m, pages, "after writing to all pages");
			expect_no_huge(m, "while logging");
		}

		set_log(m, false);
		guest_checks_all(m);
		expect_huge(m, 0, "after logging");
		vmm_checks_all(m);
	}

	free(pages);
}

/* Have the vCPU forget translations, so that it sees what KVM maps now. */
static void flush_tlb(struct kvm_vcpu *vcpu)
{
	struct kvm_sregs sregs;

	vcpu_sregs_get(vcpu, &sregs);
	sregs.cr4 ^= X86_CR4_PGE;
	vcpu_sregs_set(vcpu, &sregs);
}

/* To map memory ahead isn't to write it, and changes nothing of what was written. */
static void test_pre_fault(struct machine *m)
{
	/* More than fits into the ring, if there's as much. */
	const uint64_t size = min(m->npages, RING_COUNT + 1024ul) * PAGE_SIZE;
	unsigned long *pages;
	uint64_t faults;

	if (!kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY))
		return;

	pages = bitmap_zalloc(m->npages);
	delete_slot(m, TEST_SLOT);
	set_log(m, true);
	expect_first_log(m);
	gmem_pre_fault(m->vcpu, TEST_GPA, size);
	expect_log(m, NULL, "after pre-faulting");

	write_some(m, pages, 0);
	gmem_pre_fault(m->vcpu, TEST_GPA, size);
	flush_tlb(m->vcpu);
	faults = gmem_vcpu_stat(m->vcpu, "pf_taken");
	write_some(m, pages, 0);
	/* Of the rest of the VM's memory, the host may have reclaimed something. */
	faults = gmem_vcpu_stat(m->vcpu, "pf_taken") - faults;
	TEST_ASSERT(faults <= 3, "%lu faults on writable pages", faults);
	expect_log(m, pages, "after writing and pre-faulting");

	gmem_pre_fault(m->vcpu, TEST_GPA, size);
	expect_log(m, NULL, "after pre-faulting what was written");
	write_some(m, pages, 1);
	expect_log(m, pages, "after writing to what was pre-faulted");

	set_log(m, false);
	guest_checks_all(m);
	expect_huge(m, 0, "after logging");
	vmm_checks_all(m);
	free(pages);
}

/* Logging from the beginning, with memory that isn't there yet or any more. */
static void test_from_creation(struct machine *m)
{
	const uint64_t hole = m->npages / 2 + 5;
	unsigned long *pages = bitmap_zalloc(m->npages);
	uint64_t i;

	delete_slot(m, TEST_SLOT);
	punch(m, 0, m->npages);
	set_log(m, true);
	expect_first_log(m);

	for (i = 0; i < min(m->npages, 4096ul); i += 3) {
		guest_writes(m, i);
		__set_bit(i, pages);
	}
	expect_log(m, pages, "after writing to empty memory");
	expect_no_huge(m, "while logging");

	/* A hole isn't a write, but what the guest does to it is. */
	guest_writes(m, hole);
	fetch_log(m);
	punch(m, hole, 1);
	expect_log(m, NULL, "after a hole");
	guest_writes(m, hole);
	bitmap_zero(pages, m->npages);
	__set_bit(hole, pages);
	expect_log(m, pages, "after writing to a hole");

	set_log(m, false);
	guest_checks_all(m);
	/* The hole has split its folio, unless that's a gigantic one. */
	expect_huge(m, m->level == PG_LEVEL_2M ? 512 : 0, "after logging");
	vmm_checks_all(m);
	delete_slot(m, TEST_SLOT);
	free(pages);
}

struct load {
	struct machine *m;
	bool stop;
	uint64_t passes;
};

static void *load_thread(void *arg)
{
	struct load *load = arg;
	struct machine *m = load->m;

	while (!READ_ONCE(load->stop)) {
		guest_does(m, .op = GMEM_SET, .gva = TEST_GPA, .nr = m->npages,
			   .val = gmem_tag(0) + load->passes, .step = GMEM_TAG_STEP);
		WRITE_ONCE(load->passes, load->passes + 1);
	}

	return NULL;
}

static void fetch_more(struct machine *m, unsigned long *logged)
{
	fetch_log(m);
	for (uint64_t i = 0; i < BITS_TO_LONGS(m->npages); i++)
		logged[i] |= m->dirty[i];
}

/*
 * Nothing that a running vCPU writes is missed: what has changed since the memory
 * was looked at must be in one of the logs fetched since.  The VMM looks at it
 * before it fetches, i.e. the writes in between are in that log or in a later one.
 */
static void test_under_load(struct machine *m, int rounds)
{
	unsigned long *logged = bitmap_zalloc(m->npages);
	struct load load = { .m = m };
	int i, fetch, ret;
	pthread_t thread;
	uint64_t page;

	set_log(m, false);
	ret = pthread_create(&thread, NULL, load_thread, &load);
	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("pthread_create()", ret));

	for (i = 0; i < rounds; i++) {
		set_log(m, true);
		fetch_log(m);

		/* Aliases, which log for themselves, come and go as well. */
		vm_set_user_memory_region2(m->vm, ALIAS_SLOT, KVM_MEM_GUEST_MEMFD |
					   (i % 2 ? KVM_MEM_LOG_DIRTY_PAGES : 0),
					   ALIAS_GPA, m->npages * PAGE_SIZE, NULL,
					   m->fd, 0);

		for (page = 0; page < m->npages; page++)
			m->model[page] = READ_ONCE(*(uint64_t *)(m->mem + page * PAGE_SIZE));
		bitmap_zero(logged, m->npages);
		for (fetch = 0; fetch < 3; fetch++)
			fetch_more(m, logged);
		delete_slot(m, ALIAS_SLOT);

		/* The last round ends with the vCPU stopped. */
		if (i == rounds - 1) {
			/* Other threads may have had the CPUs until now. */
			while (!READ_ONCE(load.passes))
				usleep(1000);
			WRITE_ONCE(load.stop, true);
			pthread_join(thread, NULL);
			fetch_more(m, logged);
			for (page = 0; page < m->npages; page++) {
				uint64_t seen = *(uint64_t *)(m->mem + page * PAGE_SIZE);

				TEST_ASSERT(seen == m->model[page] || test_bit(page, logged),
					    "Page %lu went from 0x%lx to 0x%lx, not logged by %s",
					    page, m->model[page], seen, mode_names[m->mode]);
			}
		}

		set_log(m, false);
	}

	TEST_ASSERT(load.passes, "The vCPU has done nothing");
	for (page = 0; page < m->npages; page++)
		m->model[page] = gmem_tag(page) + load.passes - 1;
	guest_checks_all(m);
	vmm_checks_all(m);
	delete_slot(m, TEST_SLOT);
	free(logged);
}

static void test_mode(enum log_mode mode, uint64_t flags, uint64_t size, int level)
{
	struct machine m;

	create_machine(&m, mode, flags, size, level);

	if (level == PG_LEVEL_1G) {
		fallocate(m.fd, FALLOC_FL_KEEP_SIZE, 0, size);
		if (gmem_fdinfo(m.fd, "gmem_1g") != size) {
			pr_info("No contiguous memory for pages of 1 GiB, they are not tested\n");
			free_machine(&m);
			return;
		}
	}

	pr_info("Logging by %s, folios of %lu KiB\n", mode_names[mode],
		(uint64_t)PG_LEVEL_SIZE(level) / SZ_1K);
	test_toggle(&m);
	test_pre_fault(&m);
	if (level != PG_LEVEL_1G) {
		test_from_creation(&m);
		/* A vCPU that nobody stops fills the ring. */
		if (mode != LOG_RING)
			test_under_load(&m, 15);
	}

	free_machine(&m);
}

int main(int argc, char *argv[])
{
	const uint64_t huge_2m = GUEST_MEMFD_FLAG_HUGE_2M;
	const uint64_t huge_1g = huge_2m | GUEST_MEMFD_FLAG_HUGE_1G;
	uint64_t flags;
	int mode;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD));
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_GUEST_MEMFD_SLOTS) & KVM_GUEST_MEMFD_SLOTS_LOG_DIRTY);
	gmem_stop_numa_balancing();
	flags = kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS);

	/* Who needs contiguous memory comes first, and takes long, i.e. one of a kind. */
	if ((flags & huge_1g) == huge_1g && kvm_cpu_has(X86_FEATURE_GBPAGES)) {
		test_mode(LOG_BITMAP, huge_1g, SZ_1G, PG_LEVEL_1G);
		if (mode_is_possible(LOG_RING))
			test_mode(LOG_RING, huge_1g, SZ_1G, PG_LEVEL_1G);
	}

	for (mode = 0; mode < NR_LOG_MODES; mode++) {
		if (!mode_is_possible(mode)) {
			pr_info("No logging by %s\n", mode_names[mode]);
			continue;
		}

		test_mode(mode, 0, SZ_8M, PG_LEVEL_4K);
		if (flags & huge_2m)
			test_mode(mode, huge_2m, SZ_64M, PG_LEVEL_2M);
	}

	return 0;
}
