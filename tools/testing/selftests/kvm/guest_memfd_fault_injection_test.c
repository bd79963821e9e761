// SPDX-License-Identifier: GPL-2.0-only
/*
 * Let each allocation fail that guest_memfd's operations make, one at a time.
 *
 * An operation is repeated with its first allocation failing, then its second,
 * and so on, until it has made all that it needs.  Each time, it either succeeds
 * because there's a fallback, or says ENOMEM and has had no effect, i.e. it works
 * right after, and the VM and its memory are as they were.
 *
 * Leaks are for kmemleak to find, once this test is done.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <asm/kvm_para.h>
#include <linux/falloc.h>
#include <linux/mman.h>
#include <linux/sizes.h>
#include <sys/mman.h>

#include "guest_memfd.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"

#define GMEM_SHARED	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)

#define FAULTS		"/sys/kernel/debug"

/* The memory that operations are about, and memory that must not change. */
#define TEST_SLOT	10
#define TEST_GPA	SZ_4G
#define KEPT_SLOT	11
#define KEPT_GPA	(TEST_GPA + SZ_1G)
#define TEST_SIZE	SZ_4M
#define NPAGES		(TEST_SIZE / PAGE_SIZE)

struct machine {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	uint64_t flags;
	/* How much of the file is populated: each of its allocations fails once. */
	uint64_t used;
	int fd, kept_fd;
	/* The file, or if it's private, what isn't. */
	void *mem;
	uint64_t *kept;
};

enum which {
	ALL,
	SHARED,
	PRIVATE,
};

struct operation {
	const char *name;
	/* The files that it is for. */
	enum which which;
	/* Bring about what the operation needs. */
	void (*prepare)(struct machine *m);
	/* Returns a negative value and errno if it fails. */
	int (*run)(struct machine *m);
	/* Undo a successful operation. */
	void (*undo)(struct machine *m);
};

static int fail_nth_fd;

static bool is_private(struct machine *m)
{
	return !(m->flags & GUEST_MEMFD_FLAG_INIT_SHARED);
}

static bool write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	bool done;

	if (fd < 0)
		return false;
	done = write(fd, text, strlen(text)) > 0;
	close(fd);
	return done;
}

/* Only for what asks for it, and without a trace in the kernel's log for each. */
static bool set_up_injection(void)
{
	static const char * const knobs[][2] = {
		{ FAULTS "/failslab/ignore-gfp-wait", "N" },
		{ FAULTS "/failslab/verbose", "0" },
		{ FAULTS "/fail_page_alloc/ignore-gfp-wait", "N" },
		{ FAULTS "/fail_page_alloc/ignore-gfp-highmem", "N" },
		{ FAULTS "/fail_page_alloc/min-order", "0" },
		{ FAULTS "/fail_page_alloc/verbose", "0" },
	};

	for (int i = 0; i < ARRAY_SIZE(knobs); i++) {
		if (!write_file(knobs[i][0], knobs[i][1]))
			return false;
	}

	fail_nth_fd = open("/proc/thread-self/fail-nth", O_RDWR);
	return fail_nth_fd >= 0;
}

static void let_fail(int nth)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%d", nth);

	TEST_ASSERT_EQ(pwrite(fail_nth_fd, text, len, 0), len);
}

/* Has an allocation failed since let_fail()? */
static bool has_failed(void)
{
	char text[16] = {};

	TEST_ASSERT(pread(fail_nth_fd, text, sizeof(text) - 1, 0) > 0,
		    __KVM_SYSCALL_ERROR("pread()", -1));
	return !atoi(text);
}

/*
 * Operations
 */

static void punch(struct machine *m, uint64_t offset, uint64_t size)
{
	TEST_ASSERT(!fallocate(m->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, size),
		    __KVM_SYSCALL_ERROR("fallocate()", -1));
}

static void punch_all(struct machine *m)
{
	punch(m, 0, TEST_SIZE);
}

/* The library's function makes allocations of its own before that. */
static int set_slot(struct machine *m, uint64_t size, uint32_t flags)
{
	struct kvm_userspace_memory_region2 region = {
		.slot = TEST_SLOT,
		.flags = KVM_MEM_GUEST_MEMFD | flags,
		.guest_phys_addr = TEST_GPA,
		.memory_size = size,
		.guest_memfd = m->fd,
		.userspace_addr = is_private(m) ? (uintptr_t)m->mem : 0,
	};

	return __vm_ioctl(m->vm, KVM_SET_USER_MEMORY_REGION2, &region);
}

static void do_nothing(struct machine *m)
{
}

static int new_fd;

static int create(struct machine *m)
{
	new_fd = __vm_create_guest_memfd(m->vm, TEST_SIZE, m->flags);
	return new_fd;
}

static void close_new(struct machine *m)
{
	close(new_fd);
}

/* Giving memory back must not need any that can't be had. */
static void create_populated(struct machine *m)
{
	new_fd = vm_create_guest_memfd(m->vm, TEST_SIZE, m->flags);
	TEST_ASSERT(!fallocate(new_fd, FALLOC_FL_KEEP_SIZE, 0, m->used),
		    __KVM_SYSCALL_ERROR("fallocate()", -1));
}

static int release(struct machine *m)
{
	return close(new_fd);
}

static void unbind(struct machine *m)
{
	TEST_ASSERT(!set_slot(m, 0, 0), __KVM_SYSCALL_ERROR("KVM_SET_USER_MEMORY_REGION2", -1));
}

static void bind(struct machine *m)
{
	TEST_ASSERT(!set_slot(m, TEST_SIZE, 0),
		    __KVM_SYSCALL_ERROR("KVM_SET_USER_MEMORY_REGION2", -1));
}

static int try_bind(struct machine *m)
{
	return set_slot(m, TEST_SIZE, 0);
}

static int try_unbind(struct machine *m)
{
	return set_slot(m, 0, 0);
}

static void *new_mem;

static int map(struct machine *m)
{
	new_mem = mmap(NULL, TEST_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
	return new_mem == MAP_FAILED ? -1 : 0;
}

static void unmap_new(struct machine *m)
{
	munmap(new_mem, TEST_SIZE);
}

static int vmm_fault(struct machine *m)
{
	return madvise(m->mem, m->used, MADV_POPULATE_WRITE);
}

static int populate(struct machine *m)
{
	return fallocate(m->fd, FALLOC_FL_KEEP_SIZE, 0, m->used);
}

static void populate_now(struct machine *m)
{
	TEST_ASSERT(!populate(m), __KVM_SYSCALL_ERROR("fallocate()", -1));
}

/* The folio is split, or, without memory for that, zeroed in part. */
static int punch_part(struct machine *m)
{
	return fallocate(m->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
			 3 * PAGE_SIZE, 5 * PAGE_SIZE);
}

/* From a VM without any SPTE, so that page tables are allocated as well. */
static void zap_and_punch(struct machine *m)
{
	unbind(m);
	bind(m);
	punch_all(m);
}

static void prepare_guest_fault(struct machine *m)
{
	zap_and_punch(m);
	if (is_private(m))
		vm_mem_set_private(m->vm, TEST_GPA, TEST_SIZE);
	*gmem_vcpu_work(m->vcpu) = (struct gmem_work) {
		.op = GMEM_SET,
		.gva = TEST_GPA,
		.nr = 16,
		.stride = m->used / 16,
		.val = 1,
	};
}

static int guest_fault(struct machine *m)
{
	return __vcpu_run(m->vcpu);
}

static void end_guest_fault(struct machine *m)
{
	struct gmem_work work = *gmem_vcpu_work(m->vcpu);
	struct ucall uc;

	TEST_ASSERT_KVM_EXIT_REASON(m->vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(get_ucall(m->vcpu, &uc), UCALL_SYNC);
	work.op = GMEM_CHECK;
	gmem_vcpu_run(m->vcpu, &work);
	if (is_private(m))
		vm_mem_set_shared(m->vm, TEST_GPA, TEST_SIZE);
	punch_all(m);
}

/* Logging dirty pages takes another memslot, a bitmap, and smaller mappings. */
static void map_all(struct machine *m)
{
	prepare_guest_fault(m);
	TEST_ASSERT(!guest_fault(m), __KVM_SYSCALL_ERROR("KVM_RUN", -1));
}

static int start_logging(struct machine *m)
{
	return set_slot(m, TEST_SIZE, KVM_MEM_LOG_DIRTY_PAGES);
}

static void stop_logging(struct machine *m)
{
	bind(m);
	end_guest_fault(m);
}

static void map_and_log_all(struct machine *m)
{
	map_all(m);
	TEST_ASSERT(!start_logging(m), __KVM_SYSCALL_ERROR("KVM_SET_USER_MEMORY_REGION2", -1));
}

static int pre_fault(struct machine *m)
{
	struct kvm_pre_fault_memory range = { .gpa = TEST_GPA, .size = m->used };
	int r;

	do {
		r = __vcpu_ioctl(m->vcpu, KVM_PRE_FAULT_MEMORY, &range);
	} while (!r && range.size);
	return r;
}

static int set_policy(struct machine *m)
{
	unsigned long mask = 1;

	return mbind(m->mem + SZ_1M, SZ_1M, MPOL_BIND, &mask, 8 * sizeof(mask), 0);
}

static void reset_policy(struct machine *m)
{
	mbind(m->mem, TEST_SIZE, MPOL_DEFAULT, NULL, 0, 0);
}

static void make_shared(struct machine *m)
{
	vm_mem_set_shared(m->vm, TEST_GPA, TEST_SIZE);
}

static int convert(struct machine *m)
{
	struct kvm_memory_attributes attributes = {
		.address = TEST_GPA + PAGE_SIZE,
		.size = SZ_2M,
		.attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE,
	};

	return __vm_ioctl(m->vm, KVM_SET_MEMORY_ATTRIBUTES, &attributes);
}

/* KVM looks for the page, and accesses it itself. */
static int enable_kvmclock(struct machine *m)
{
	int r = _vcpu_set_msr(m->vcpu, MSR_KVM_SYSTEM_TIME_NEW, TEST_GPA | 1);

	if (r == 1)
		return 0;
	errno = ENOMEM;
	return -1;
}

static void disable_kvmclock(struct machine *m)
{
	vcpu_set_msr(m->vcpu, MSR_KVM_SYSTEM_TIME_NEW, 0);
	punch_all(m);
}

static const struct operation operations[] = {
	{ "create", ALL, do_nothing, create, close_new },
	{ "release", ALL, create_populated, release, do_nothing },
	{ "bind", ALL, unbind, try_bind, do_nothing },
	{ "unbind", ALL, do_nothing, try_unbind, bind },
	{ "mmap", SHARED, do_nothing, map, unmap_new },
	{ "mbind", SHARED, do_nothing, set_policy, reset_policy },
	{ "VMM fault", SHARED, punch_all, vmm_fault, punch_all },
	{ "fallocate", ALL, punch_all, populate, punch_all },
	{ "hole", ALL, populate_now, punch_part, punch_all },
	{ "guest fault", ALL, prepare_guest_fault, guest_fault, end_guest_fault },
	{ "start of logging", SHARED, map_all, start_logging, stop_logging },
	{ "end of logging", SHARED, map_and_log_all, try_bind, stop_logging },
	{ "conversion", PRIVATE, make_shared, convert, make_shared },
	{ "pre-fault", SHARED, zap_and_punch, pre_fault, punch_all },
	{ "kvmclock", SHARED, zap_and_punch, enable_kvmclock, disable_kvmclock },
};

/*
 * The VM
 */

static void kept_does(struct machine *m, enum gmem_op op)
{
	struct gmem_work work = {
		.op = op,
		.gva = KEPT_GPA,
		.nr = NPAGES,
		.stride = PAGE_SIZE,
		.val = gmem_tag(0),
		.step = GMEM_TAG_STEP,
	};

	gmem_vcpu_run(m->vcpu, &work);
}

static void check_kept(struct machine *m)
{
	kept_does(m, GMEM_CHECK);
	for (uint64_t i = 0; i < NPAGES; i++)
		TEST_ASSERT_EQ(m->kept[i * PAGE_SIZE / sizeof(*m->kept)], gmem_tag(i));
}

static void *map_anonymous(void)
{
	void *mem = mmap(NULL, TEST_SIZE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	return mem;
}

static void create_machine(struct machine *m, uint64_t flags)
{
	struct vm_shape shape = VM_SHAPE_DEFAULT;

	m->flags = flags;
	m->used = flags & GUEST_MEMFD_FLAG_HUGE_2M ? TEST_SIZE : 16 * PAGE_SIZE;
	if (is_private(m))
		shape.type = KVM_X86_SW_PROTECTED_VM;
	m->vm = __vm_create_shape_with_one_vcpu(shape, &m->vcpu, 0, gmem_guest_code);
	vcpu_args_set(m->vcpu, 1, 0ULL);

	m->fd = vm_create_guest_memfd(m->vm, TEST_SIZE, flags);
	m->mem = is_private(m) ? map_anonymous() : gmem_mmap(m->fd, TEST_SIZE, 0);
	bind(m);
	m->kept_fd = vm_create_guest_memfd(m->vm, TEST_SIZE, flags);
	m->kept = is_private(m) ? map_anonymous() : gmem_mmap(m->kept_fd, TEST_SIZE, 0);
	vm_set_user_memory_region2(m->vm, KEPT_SLOT, KVM_MEM_GUEST_MEMFD, KEPT_GPA, TEST_SIZE,
				   is_private(m) ? m->kept : NULL, m->kept_fd, 0);
	virt_map_level(m->vm, TEST_GPA, TEST_GPA, TEST_SIZE, PG_LEVEL_2M);
	virt_map_level(m->vm, KEPT_GPA, KEPT_GPA, TEST_SIZE, PG_LEVEL_2M);
	kept_does(m, GMEM_SET);
}

static void free_machine(struct machine *m)
{
	kvm_vm_free(m->vm);
	munmap(m->mem, TEST_SIZE);
	munmap(m->kept, TEST_SIZE);
	close(m->fd);
	close(m->kept_fd);
}

/* Returns the number of allocations that have failed. */
static int inject(struct machine *m, const struct operation *op)
{
	int nth, r, err, nr_fallbacks = 0;
	bool failed;

	for (nth = 1; ; nth++) {
		op->prepare(m);

		let_fail(nth);
		r = op->run(m);
		err = errno;
		failed = has_failed();
		let_fail(0);

		TEST_ASSERT(r >= 0 || (failed && err == ENOMEM),
			    "%s: allocation %d%s, r %d, %s", op->name, nth,
			    failed ? "" : " was not made", r, strerror(err));
		/* That's for what userspace can do something about. */
		TEST_ASSERT(r >= 0 || m->vcpu->run->exit_reason != KVM_EXIT_MEMORY_FAULT,
			    "%s: allocation %d had an exit for a memory fault", op->name, nth);
		nr_fallbacks += failed && r >= 0;

		/* The same once more does it, or what is left of the same. */
		if (r < 0)
			TEST_ASSERT(op->run(m) >= 0, "%s: fails again, %s", op->name,
				    strerror(errno));
		op->undo(m);
		kept_does(m, GMEM_CHECK);
		if (!failed)
			break;
	}

	check_kept(m);
	TEST_ASSERT_EQ(gmem_fdinfo(m->fd, "gmem_4k") + gmem_fdinfo(m->fd, "gmem_2m"), 0);
	pr_info("  %-12s %d allocations failed, %d of them had a fallback\n", op->name, nth - 1,
		nr_fallbacks);
	return nth - 1;
}

/* Not without TDP. */
static bool can_pre_fault(struct machine *m)
{
	return kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY) && (!pre_fault(m) || errno != EOPNOTSUPP);
}

static int test_flags(uint64_t flags)
{
	struct machine m;
	int nr = 0;

	pr_info("Flags 0x%lx\n", flags);
	create_machine(&m, flags);
	for (int i = 0; i < ARRAY_SIZE(operations); i++) {
		if (operations[i].which == (is_private(&m) ? SHARED : PRIVATE))
			continue;
		if (operations[i].run == pre_fault && !can_pre_fault(&m))
			continue;
		nr += inject(&m, &operations[i]);
	}
	free_machine(&m);
	return nr;
}

static void check_replaced(struct kvm_vcpu *vcpu, uint64_t *mem, uint64_t hole)
{
	const uint64_t npages = SZ_1G / PAGE_SIZE, words = PAGE_SIZE / sizeof(*mem);
	struct gmem_work work = {
		.op = GMEM_CHECK,
		.gva = TEST_GPA,
		.nr = hole,
		.stride = PAGE_SIZE,
		.val = gmem_tag(0),
		.step = GMEM_TAG_STEP,
	};

	for (uint64_t i = 0; i < npages; i++)
		TEST_ASSERT(mem[i * words] == (i == hole ? 0 : gmem_tag(i)),
			    "VMM sees 0x%lx in page %lu, the hole is page %lu",
			    mem[i * words], i, hole);

	gmem_vcpu_run(vcpu, &work);
	work.gva += (hole + 1) * PAGE_SIZE;
	work.nr = npages - hole - 1;
	work.val = gmem_tag(hole + 1);
	gmem_vcpu_run(vcpu, &work);
}

/*
 * A hole over a bad page in a folio of 1 GiB has the folio replaced by smaller
 * ones.  If one of these isn't to be had, its memory is in pages, and what comes
 * next is where it was.  As the bad folio is lost, this is done once.
 */
static int test_replace(void)
{
	const uint64_t words = PAGE_SIZE / sizeof(uint64_t), bad = SZ_512M / PAGE_SIZE + 7;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	int fd, err, nr = 0;
	uint64_t *mem;

	vm = __vm_create_shape_with_one_vcpu(VM_SHAPE_DEFAULT, &vcpu, 1024, gmem_guest_code);
	vcpu_args_set(vcpu, 1, 0ULL);
	fd = vm_create_guest_memfd(vm, SZ_1G, GMEM_SHARED | GUEST_MEMFD_FLAG_HUGE_2M |
					      GUEST_MEMFD_FLAG_HUGE_1G);
	mem = gmem_mmap(fd, SZ_1G, 0);
	vm_set_user_memory_region2(vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD, TEST_GPA, SZ_1G, NULL,
				   fd, 0);
	gmem_map_in_guest(vm, TEST_GPA, SZ_1G, PG_LEVEL_2M);

	for (uint64_t i = 0; i < SZ_1G / PAGE_SIZE; i++)
		mem[i * words] = gmem_tag(i);

	if (gmem_fdinfo(fd, "gmem_1g") != SZ_1G) {
		pr_info("There's no 1 GiB of contiguous memory\n");
		goto out;
	}
	err = gmem_inject_memory_error(&mem[bad * words]);
	if (err == EINVAL || err == EPERM) {
		pr_info("Cannot inject memory errors, %s\n", strerror(err));
		goto out;
	}

	/* One of 512 for 2 MiB, and not of the first ones. */
	let_fail(20);
	err = fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, bad * PAGE_SIZE,
			PAGE_SIZE) ? errno : 0;
	TEST_ASSERT(has_failed(), "There were less than 20 allocations");
	let_fail(0);
	TEST_ASSERT(!err, "A hole over a bad page failed, %s", strerror(err));

	check_replaced(vcpu, mem, bad);
	/* What wasn't to be had, and what the hole is in; the check has filled that. */
	TEST_ASSERT_EQ(gmem_fdinfo(fd, "gmem_4k"), 2 * SZ_2M);
	TEST_ASSERT_EQ(gmem_fdinfo(fd, "gmem_2m"), SZ_1G - 2 * SZ_2M);
	pr_info("1 allocation failed while a folio of 1 GiB was replaced\n");
	nr = 1;
out:
	kvm_vm_free(vm);
	munmap(mem, SZ_1G);
	close(fd);
	return nr;
}

int main(void)
{
	static const uint64_t all_flags[] = {
		GMEM_SHARED, GMEM_SHARED | GUEST_MEMFD_FLAG_HUGE_2M,
		0, GUEST_MEMFD_FLAG_HUGE_2M,
	};
	uint64_t supported;
	int nr = 0;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD_FLAGS));
	supported = kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS);
	TEST_REQUIRE((supported & GMEM_SHARED) == GMEM_SHARED);
	__TEST_REQUIRE(set_up_injection(), "failslab and fail_page_alloc needed");

	for (int i = 0; i < ARRAY_SIZE(all_flags); i++) {
		if (!(all_flags[i] & GMEM_SHARED) &&
		    !(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
			continue;
		if (!(all_flags[i] & ~supported))
			nr += test_flags(all_flags[i]);
	}
	if (supported & GUEST_MEMFD_FLAG_HUGE_1G)
		nr += test_replace();
	pr_info("%d allocations failed\n", nr);
	return 0;
}
