// SPDX-License-Identifier: GPL-2.0
/*
 * Holes in a guest_memfd: whatever the file's folios are, and whoever holds on
 * to them, when a hole has been punched its range reads as zeros, and all other
 * memory of the file is as it was, both for the guest and for the VMM.
 *
 * Pages with memory errors cost the guest that page, no more, and a hole over it
 * makes it a good one again.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

#include "guest_memfd.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"

#define GMEM_SHARED	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)

#define TEST_GPA	(4ULL << 30)
#define TEST_SLOT	10
#define NPAGES_2M	((uint64_t)(SZ_2M / PAGE_SIZE))

struct machine {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct kvm_regs regs;
	int fd;
	uint64_t npages;
	uint64_t *mem;
	/* What each page should hold. */
	uint64_t *expected;
	/* Look at every page, or, if the file is big, at one out of so many. */
	uint64_t step;
};

static void set_slot(struct machine *m)
{
	vm_set_user_memory_region2(m->vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD, TEST_GPA,
				   m->npages * PAGE_SIZE, NULL, m->fd, 0);
}

static void delete_slot(struct machine *m)
{
	vm_set_user_memory_region2(m->vm, TEST_SLOT, 0, 0, 0, NULL, 0, 0);
}

static void create_machine_with_vcpus(struct machine *m, uint64_t flags, uint64_t size,
				      int nr_vcpus, struct kvm_vcpu **vcpus, void *code)
{
	const bool gigantic = flags & GUEST_MEMFD_FLAG_HUGE_1G;
	const int level = gigantic && kvm_cpu_has(X86_FEATURE_GBPAGES) ?
			  PG_LEVEL_1G : PG_LEVEL_2M;
	void *mem;

	memset(m, 0, sizeof(*m));
	m->npages = size / PAGE_SIZE;
	m->step = gigantic ? 997 : 1;
	m->vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, nr_vcpus, 4 * NPAGES_2M, code,
				       vcpus);
	for (int i = 0; i < nr_vcpus; i++)
		vcpu_args_set(vcpus[i], 1, (uint64_t)i);
	m->vcpu = vcpus[0];

	virt_map_level(m->vm, TEST_GPA, TEST_GPA, align_up(size, PG_LEVEL_SIZE(level)), level);

	/* The VMM's mapping is aligned, to be huge if possible. */
	m->fd = vm_create_guest_memfd(m->vm, size, flags | GMEM_SHARED);
	mem = mmap(NULL, size + SZ_2M, PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	m->mem = mmap(align_ptr_up(mem, SZ_2M), size, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_FIXED, m->fd, 0);
	TEST_ASSERT(m->mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	madvise(m->mem, size, MADV_HUGEPAGE);

	m->expected = calloc(m->npages, sizeof(*m->expected));
	TEST_ASSERT(m->expected, "No memory for %lu pages", m->npages);

	set_slot(m);
}

static void create_machine(struct machine *m, uint64_t flags, uint64_t size)
{
	struct kvm_vcpu *vcpu;

	create_machine_with_vcpus(m, flags, size, 1, &vcpu, gmem_guest_code);

	/* Where the guest can be sent back to after an exit. */
	vcpu_regs_get(vcpu, &m->regs);
}

static void free_machine(struct machine *m)
{
	kvm_vm_free(m->vm);
	munmap(m->mem, m->npages * PAGE_SIZE);
	close(m->fd);
	free(m->expected);
}

static uint64_t *page_address(struct machine *m, uint64_t page)
{
	return m->mem + page * (PAGE_SIZE / sizeof(*m->mem));
}

static void guest_does(struct machine *m, enum gmem_op op, uint64_t page, uint64_t val)
{
	struct gmem_work work = {
		.op = op,
		.gva = TEST_GPA + page * PAGE_SIZE,
		.nr = 1,
		.stride = PAGE_SIZE,
		.val = val,
	};

	gmem_vcpu_run(m->vcpu, &work);
}

/*
 * The guest checks pages in runs of what differs by the same amount, i.e. of good
 * pages and of holes.
 */
static void guest_checks(struct machine *m, uint64_t first, uint64_t end)
{
	uint64_t i, j;

	for (i = first; i < end; i = j) {
		struct gmem_work work = {
			.op = GMEM_CHECK,
			.gva = TEST_GPA + i * PAGE_SIZE,
			.stride = m->step * PAGE_SIZE,
			.val = m->expected[i],
		};

		j = i + m->step;
		if (j < end)
			work.step = m->expected[j] - m->expected[i];
		for (work.nr = 1; j < end; work.nr++, j += m->step) {
			if (m->expected[j] - m->expected[j - m->step] != work.step)
				break;
		}
		gmem_vcpu_run(m->vcpu, &work);
	}
}

static void vmm_checks(struct machine *m, uint64_t first, uint64_t end)
{
	for (uint64_t i = first; i < end; i += m->step)
		TEST_ASSERT(READ_ONCE(*page_address(m, i)) == m->expected[i],
			    "VMM sees 0x%lx in page %lu, expected 0x%lx",
			    READ_ONCE(*page_address(m, i)), i, m->expected[i]);
}

static void check_all(struct machine *m)
{
	guest_checks(m, 0, m->npages);
	vmm_checks(m, 0, m->npages);
}

/* Neighbours are checked page by page, also if the file is big. */
static void check_around(struct machine *m, uint64_t page)
{
	const uint64_t step = m->step;

	m->step = 1;
	guest_checks(m, page < 16 ? 0 : page - 16, min(page + 16, m->npages));
	vmm_checks(m, page < 16 ? 0 : page - 16, min(page + 16, m->npages));
	m->step = step;
}

static void fill(struct machine *m)
{
	for (uint64_t i = 0; i < m->npages; i++) {
		m->expected[i] = gmem_tag(i);
		if (!(i % m->step))
			*page_address(m, i) = m->expected[i];
		else
			m->expected[i] = 0;
	}
}

static void fill_around(struct machine *m, uint64_t page)
{
	for (uint64_t i = page < 16 ? 0 : page - 16; i < min(page + 16, m->npages); i++) {
		m->expected[i] = gmem_tag(i) + 1;
		*page_address(m, i) = m->expected[i];
	}
}

static int __punch(struct machine *m, uint64_t page, uint64_t nr)
{
	return fallocate(m->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
			 page * PAGE_SIZE, nr * PAGE_SIZE);
}

static void punch(struct machine *m, uint64_t page, uint64_t nr)
{
	int ret = __punch(m, page, nr);

	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("fallocate()", ret));
	memset(&m->expected[page], 0, nr * sizeof(*m->expected));
}

static uint64_t held(struct machine *m)
{
	return gmem_fdinfo(m->fd, "gmem_4k") + gmem_fdinfo(m->fd, "gmem_2m") +
	       gmem_fdinfo(m->fd, "gmem_1g");
}

static void assert_empty(struct machine *m)
{
	TEST_ASSERT_EQ(held(m), 0);
}

/*
 * Pins
 */

struct uring {
	int fd;
	void *sq, *cq;
	struct io_uring_sqe *sqes;
	struct io_uring_params params;
};

struct pin {
	const char *name;
	void (*pin)(struct machine *m, uint64_t page);
	/* Write val to the page by way of the pin, or read what it has. */
	void (*verify)(struct machine *m, uint64_t page);
	void (*unpin)(void);
};

static int pipe_fds[2];

static void vmsplice_pin(struct machine *m, uint64_t page)
{
	struct iovec iov = { page_address(m, page), PAGE_SIZE };
	int ret;

	ret = pipe(pipe_fds);
	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("pipe()", ret));
	ret = vmsplice(pipe_fds[1], &iov, 1, 0);
	TEST_ASSERT(ret == PAGE_SIZE, __KVM_SYSCALL_ERROR("vmsplice()", ret));
}

/* What the guest writes now is what comes out of the pipe. */
static void vmsplice_verify(struct machine *m, uint64_t page)
{
	uint64_t val;
	int ret;

	m->expected[page] = gmem_tag(page) + 7;
	guest_does(m, GMEM_SET, page, m->expected[page]);
	ret = read(pipe_fds[0], &val, sizeof(val));
	TEST_ASSERT(ret == sizeof(val), __KVM_SYSCALL_ERROR("read()", ret));
	TEST_ASSERT(val == m->expected[page],
		    "The pipe has 0x%lx, expected 0x%lx, the page was replaced",
		    val, m->expected[page]);
}

static void vmsplice_unpin(void)
{
	close(pipe_fds[0]);
	close(pipe_fds[1]);
}

static struct uring uring;

static void uring_pin(struct machine *m, uint64_t page)
{
	struct iovec iov = { page_address(m, page), PAGE_SIZE };
	int ret;

	memset(&uring, 0, sizeof(uring));
	uring.fd = syscall(__NR_io_uring_setup, 1, &uring.params);
	TEST_ASSERT(uring.fd >= 0, __KVM_SYSCALL_ERROR("io_uring_setup()", uring.fd));
	uring.sq = mmap(NULL, SZ_64K, PROT_READ | PROT_WRITE, MAP_SHARED, uring.fd,
			IORING_OFF_SQ_RING);
	uring.sqes = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, uring.fd,
			  IORING_OFF_SQES);
	if (uring.sq == MAP_FAILED)
		uring.sq = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
				uring.fd, IORING_OFF_SQ_RING);
	TEST_ASSERT(uring.sq != MAP_FAILED && uring.sqes != MAP_FAILED,
		    __KVM_SYSCALL_ERROR("mmap()", -1));

	ret = syscall(__NR_io_uring_register, uring.fd, IORING_REGISTER_BUFFERS, &iov, 1);
	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("io_uring_register()", ret));
}

/* What's read into the fixed buffer is what the guest finds in the page. */
static void uring_verify(struct machine *m, uint64_t page)
{
	uint64_t val = gmem_tag(page) + 9;
	int memfd = kvm_memfd_alloc(PAGE_SIZE, false), ret;
	unsigned int *tail = uring.sq + uring.params.sq_off.tail;
	unsigned int *array = uring.sq + uring.params.sq_off.array;

	ret = pwrite(memfd, &val, sizeof(val), 0);
	TEST_ASSERT(ret == sizeof(val), __KVM_SYSCALL_ERROR("pwrite()", ret));

	uring.sqes[0] = (struct io_uring_sqe) {
		.opcode = IORING_OP_READ_FIXED,
		.fd = memfd,
		.addr = (uint64_t)page_address(m, page),
		.len = sizeof(val),
	};
	array[0] = 0;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	ret = syscall(__NR_io_uring_enter, uring.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0);
	TEST_ASSERT(ret == 1, __KVM_SYSCALL_ERROR("io_uring_enter()", ret));
	close(memfd);

	m->expected[page] = val;
	check_around(m, page);
}

static void uring_unpin(void)
{
	munmap(uring.sqes, PAGE_SIZE);
	munmap(uring.sq, PAGE_SIZE);
	close(uring.fd);
	/* Buffers are released by a worker. */
	usleep(200000);
}

static const struct pin pins[] = {
	{ "vmsplice", vmsplice_pin, vmsplice_verify, vmsplice_unpin },
	{ "io_uring fixed buffer", uring_pin, uring_verify, uring_unpin },
};

/* Is the memory there in one piece of the size that the test is about? */
static bool has_folios(struct machine *m, uint64_t flags)
{
	if (flags & GUEST_MEMFD_FLAG_HUGE_1G)
		return gmem_fdinfo(m->fd, "gmem_1g") >= SZ_1G;
	if (flags & GUEST_MEMFD_FLAG_HUGE_2M)
		return gmem_fdinfo(m->fd, "gmem_2m") == m->npages * PAGE_SIZE;
	return true;
}

static bool create_filled_machine(struct machine *m, uint64_t flags)
{
	create_machine(m, flags, flags & GUEST_MEMFD_FLAG_HUGE_1G ? SZ_1G : 2 * SZ_2M);
	fill(m);
	if (!has_folios(m, flags)) {
		pr_info("Not enough contiguous memory for flags 0x%lx, skipping\n", flags);
		free_machine(m);
		return false;
	}
	return true;
}

static void test_hole_next_to_pin(uint64_t flags, const struct pin *pin)
{
	const uint64_t page = 100;
	struct machine m;

	pr_info("Flags 0x%lx: holes and a page pinned by %s\n", flags, pin->name);
	if (!create_filled_machine(&m, flags))
		return;

	fill_around(&m, page);
	check_around(&m, page);
	pin->pin(&m, page);

	/* Holes next to it, on both sides, before and after the folio's end. */
	punch(&m, page + 1, 1);
	check_around(&m, page);
	punch(&m, page - 3, 3);
	check_around(&m, page);
	check_all(&m);
	pin->verify(&m, page);
	check_around(&m, page);

	/* What was punched can be used again. */
	m.expected[page + 1] = 42;
	guest_does(&m, GMEM_SET, page + 1, 42);
	check_around(&m, page);

	/* The pinned page itself, in a hole that covers part of the folio. */
	punch(&m, page - 8, 16);
	check_around(&m, page);
	check_all(&m);

	pin->unpin();
	check_all(&m);
	punch(&m, 0, m.npages);
	assert_empty(&m);
	check_all(&m);
	free_machine(&m);
}

/* All of a pinned folio, too, reads as zeros. */
static void test_hole_over_pin(uint64_t flags, const struct pin *pin)
{
	const uint64_t page = 100;
	struct machine m;

	pr_info("Flags 0x%lx: hole over all, including a page pinned by %s\n", flags,
		pin->name);
	if (!create_filled_machine(&m, flags))
		return;

	fill_around(&m, page);
	pin->pin(&m, page);
	punch(&m, 0, m.npages);
	check_around(&m, page);
	check_all(&m);
	pin->unpin();
	punch(&m, 0, m.npages);
	assert_empty(&m);
	free_machine(&m);
}

/* Holes of all kinds, anywhere, and what they free. */
static void test_holes(uint64_t flags)
{
	struct guest_random_state random = new_guest_random_state(guest_random_seed);
	const bool gigantic = flags & GUEST_MEMFD_FLAG_HUGE_1G;
	struct machine m;
	uint64_t before;

	pr_info("Flags 0x%lx: holes\n", flags);
	if (!create_filled_machine(&m, flags))
		return;

	/* Small ones and big ones, which take their time in a folio of 1 GiB. */
	for (int i = 0; i < (gigantic ? 10 : 50); i++) {
		uint64_t first = guest_random_u32(&random) % m.npages;
		uint64_t nr = 1 + guest_random_u32(&random) %
				  (i % 2 ? 5 : gigantic ? 4 * NPAGES_2M : m.npages);

		nr = min(nr, m.npages - first);
		fill_around(&m, first);
		guest_checks(&m, first, min(first + 8, m.npages));
		before = held(&m);
		punch(&m, first, nr);
		TEST_ASSERT(held(&m) <= before, "A hole should not allocate");
		check_around(&m, first);
		check_around(&m, first + nr - 1);
		if (!(i % 10))
			check_all(&m);
		if (!gigantic)
			fill(&m);
	}
	check_all(&m);

	/* Memory that nobody holds on to is freed: a page of 2 MiB, all of 1 GiB. */
	punch(&m, 0, m.npages);
	assert_empty(&m);
	if (!gigantic) {
		fill(&m);
		punch(&m, 3, 1);
		TEST_ASSERT_EQ(held(&m), (m.npages - 1) * PAGE_SIZE);
		punch(&m, 0, NPAGES_2M);
		TEST_ASSERT_EQ(held(&m), (m.npages - NPAGES_2M) * PAGE_SIZE);
		check_all(&m);
	}

	free_machine(&m);
}

/*
 * Nobody but the file takes its folios apart or away
 */

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY), ret;

	if (fd < 0) {
		pr_info("Cannot open %s, %s\n", path, strerror(errno));
		return;
	}
	ret = write(fd, text, strlen(text));
	TEST_ASSERT(ret > 0 || errno == EINVAL, "Cannot write %s, %s", path, strerror(errno));
	close(fd);
}

/* Have the guest map all of it from scratch. */
static void assert_fresh_mappings_are_huge(struct machine *m, const char *after)
{
	uint64_t before;

	/* Deleting a memslot zaps everything, and what isn't ours comes back first. */
	delete_slot(m);
	set_slot(m);
	gmem_vcpu_run(m->vcpu, &(struct gmem_work){ .nr = 0 });
	gmem_vcpu_run(m->vcpu, &(struct gmem_work){ .nr = 0 });

	before = vm_get_stat(m->vm, "pages_2m");
	check_all(m);
	TEST_ASSERT(vm_get_stat(m->vm, "pages_2m") - before == m->npages / NPAGES_2M,
		    "%lu SPTEs of 2 MiB after %s, expected %lu",
		    vm_get_stat(m->vm, "pages_2m") - before, after,
		    m->npages / NPAGES_2M);
	TEST_ASSERT_EQ(gmem_fdinfo(m->fd, "gmem_2m"), m->npages * PAGE_SIZE);
}

static void test_nobody_else_touches_folios(void)
{
	static const struct {
		const char *name;
		int advice;
	} advices[] = {
		{ "MADV_COLD", MADV_COLD },
		{ "MADV_PAGEOUT", MADV_PAGEOUT },
		{ "MADV_COLLAPSE", MADV_COLLAPSE },
		{ "MADV_DONTNEED", MADV_DONTNEED },
	};
	unsigned long from, to;
	struct machine m;

	pr_info("Folios stay what they are\n");
	if (!create_filled_machine(&m, GUEST_MEMFD_FLAG_HUGE_2M))
		return;

	assert_fresh_mappings_are_huge(&m, "nothing");

	for (int i = 0; i < ARRAY_SIZE(advices); i++) {
		vmm_checks(&m, 0, m.npages);
		/* One page of the folio is what makes mm think of splitting it. */
		madvise(m.mem, PAGE_SIZE, advices[i].advice);
		madvise(page_address(&m, 7), 3 * PAGE_SIZE, advices[i].advice);
		madvise(m.mem, m.npages * PAGE_SIZE, advices[i].advice);
		assert_fresh_mappings_are_huge(&m, advices[i].name);
	}

	for (int i = 0; i < 2; i++) {
		from = BIT(i);
		to = BIT(!i);
		vmm_checks(&m, 0, m.npages);
		migrate_pages(0, 8 * sizeof(from), &from, &to);
		assert_fresh_mappings_are_huge(&m, "migrate_pages()");
	}

	vmm_checks(&m, 0, m.npages);
	TEST_ASSERT(madvise(m.mem, PAGE_SIZE, MADV_SOFT_OFFLINE),
		    "Nobody should move a page elsewhere");
	assert_fresh_mappings_are_huge(&m, "MADV_SOFT_OFFLINE");

	write_file("/proc/sys/vm/drop_caches", "3");
	assert_fresh_mappings_are_huge(&m, "drop_caches");
	write_file("/proc/sys/vm/compact_memory", "1");
	assert_fresh_mappings_are_huge(&m, "compaction");
	if (!access("/sys/kernel/debug/split_huge_pages", W_OK)) {
		write_file("/sys/kernel/debug/split_huge_pages", "1");
		assert_fresh_mappings_are_huge(&m, "split_huge_pages");
	}

	free_machine(&m);
}

/* The VMM's page tables have huge pages as well, wherever its mapping is put. */
static void test_vmm_maps_huge(void)
{
	unsigned long start, end, kib, mapped = 0;
	bool inside = false;
	char *mem, *gap;
	struct machine m;
	char line[512];
	FILE *smaps;

	pr_info("The VMM's mapping is huge\n");
	if (!create_filled_machine(&m, GUEST_MEMFD_FLAG_HUGE_2M))
		return;

	/* Lest it be aligned by chance. */
	gap = mmap(NULL, PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	mem = mmap(NULL, m.npages * PAGE_SIZE, PROT_READ, MAP_SHARED, m.fd, 0);
	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	for (uint64_t i = 0; i < m.npages; i++)
		READ_ONCE(mem[i * PAGE_SIZE]);
	smaps = fopen("/proc/self/smaps", "r");
	TEST_ASSERT(smaps, "Cannot open smaps, %s", strerror(errno));
	while (fgets(line, sizeof(line), smaps)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = start == (unsigned long)mem;
		else if (inside && sscanf(line, "FilePmdMapped: %lu kB", &kib) == 1)
			mapped = kib * SZ_1K;
	}
	fclose(smaps);
	TEST_ASSERT_EQ(mapped, m.npages * PAGE_SIZE);
	munmap(mem, m.npages * PAGE_SIZE);
	munmap(gap, PAGE_SIZE);
	free_machine(&m);
}

/*
 * What an administrator can trace
 */

#define TRACEFS		"/sys/kernel/tracing"
#define INSTANCE	TRACEFS "/instances/guest_memfd_hole_test"

/* How many times an event was traced with that in its text. */
static int traced(const char *event, const char *fmt, ...)
{
	char line[512], text[128];
	va_list args;
	FILE *file;
	int nr = 0;

	va_start(args, fmt);
	vsnprintf(text, sizeof(text), fmt, args);
	va_end(args);

	file = fopen(INSTANCE "/trace", "r");
	TEST_ASSERT(file, "Cannot open the trace, %s", strerror(errno));
	while (fgets(line, sizeof(line), file))
		nr += strstr(line, event) && strstr(line, text);
	fclose(file);
	return nr;
}

static void test_tracepoints(void)
{
	const uint64_t npages = 2 * NPAGES_2M;
	struct machine m;
	struct stat st;

	pr_info("Events can be traced\n");
	mount("tracefs", TRACEFS, "tracefs", 0, NULL);
	if (mkdir(INSTANCE, 0700)) {
		pr_info("There is no tracing, skipping\n");
		return;
	}
	write_file(INSTANCE "/events/guest_memfd/enable", "1");

	if (create_filled_machine(&m, GUEST_MEMFD_FLAG_HUGE_2M)) {
		TEST_ASSERT(!fstat(m.fd, &st), __KVM_SYSCALL_ERROR("fstat()", -1));
		TEST_ASSERT_EQ(traced("guest_memfd_allocate:",
				      "ino %lu index 0x0 asked order 9 got 9\n",
				      st.st_ino), 1);
		TEST_ASSERT_EQ(traced("guest_memfd_allocate:", "ino %lu ", st.st_ino), 2);

		punch(&m, NPAGES_2M + 5, 1);
		TEST_ASSERT_EQ(traced("guest_memfd_invalidate:", "ino %lu range 0x%lx-0x%lx\n",
				      st.st_ino, NPAGES_2M, npages), 1);
		TEST_ASSERT_EQ(traced("guest_memfd_split:", "ino %lu index 0x%lx order 9 ret 0\n",
				      st.st_ino, NPAGES_2M), 1);

		/* Next to what's there already there's room for a page only. */
		guest_does(&m, GMEM_SET, NPAGES_2M + 5, 42);
		TEST_ASSERT_EQ(traced("guest_memfd_allocate:",
				      "ino %lu index 0x%lx asked order 0 got 0\n",
				      st.st_ino, NPAGES_2M + 5), 1);

		free_machine(&m);
		TEST_ASSERT_EQ(traced("guest_memfd_invalidate:", "ino %lu range 0x0-0x%lx\n",
				      st.st_ino, npages), 1);
	}

	write_file(INSTANCE "/events/guest_memfd/enable", "0");
	TEST_ASSERT(!rmdir(INSTANCE), __KVM_SYSCALL_ERROR("rmdir()", -1));
}

/*
 * Memory errors
 */

/*
 * The page is lost for as long as the machine runs.  For a folio that it doesn't
 * get to split, mm returns EHWPOISON although everybody has been told.  Anything
 * else would be the end of a VMM whose guest has come across the error.
 */
static bool poison(struct machine *m, uint64_t page)
{
	bool large = gmem_fdinfo(m->fd, "gmem_2m") || gmem_fdinfo(m->fd, "gmem_1g");
	int err = gmem_inject_memory_error(page_address(m, page));

	if (err == EINVAL || err == EPERM) {
		pr_info("Cannot inject memory errors, %s\n", strerror(err));
		return false;
	}
	TEST_ASSERT(!err || (large && err == EHWPOISON),
		    "madvise(MADV_HWPOISON) failed, %s", strerror(err));
	return true;
}

/* Fails, and leaves alone what the vCPU has exited with. */
static void assert_not_pre_faulted(struct machine *m, uint64_t page)
{
	struct kvm_pre_fault_memory range = {
		.gpa = TEST_GPA + page * PAGE_SIZE,
		.size = PAGE_SIZE,
	};
	struct kvm_run *run = m->vcpu->run;
	const uint64_t data = gmem_tag(page);
	int r;

	if (!kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY))
		return;

	run->exit_reason = KVM_EXIT_MMIO;
	memcpy(run->mmio.data, &data, sizeof(data));
	r = __vcpu_ioctl(m->vcpu, KVM_PRE_FAULT_MEMORY, &range);
	TEST_ASSERT(r == -1 && errno == EHWPOISON,
		    "KVM_PRE_FAULT_MEMORY should fail with EHWPOISON, r %d, errno %d", r, errno);
	TEST_ASSERT_KVM_EXIT_REASON(m->vcpu, KVM_EXIT_MMIO);
	TEST_ASSERT(!memcmp(run->mmio.data, &data, sizeof(data)),
		    "The answer to a MMIO exit was overwritten");
}

static void assert_poisoned(struct machine *m, uint64_t page)
{
	struct gmem_work work = {
		.op = GMEM_CHECK,
		.gva = TEST_GPA + page * PAGE_SIZE,
		.nr = 1,
	};
	struct kvm_run *run = m->vcpu->run;
	int r, err;

	r = __gmem_vcpu_run(m->vcpu, &work);
	err = errno;
	TEST_ASSERT(r == -1 && err == EHWPOISON,
		    "KVM_RUN should fail with EHWPOISON, r %d, errno %d, exit reason %s",
		    r, err, exit_reason_str(run->exit_reason));
	TEST_ASSERT_KVM_EXIT_REASON(m->vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(run->memory_fault.gpa, TEST_GPA + page * PAGE_SIZE);
	TEST_ASSERT_EQ(run->memory_fault.size, PAGE_SIZE);
	gmem_vcpu_reset(m->vcpu, &m->regs);
	assert_not_pre_faulted(m, page);

	TEST_ASSERT_EQ(gmem_sigbus_code(page_address(m, page), false), BUS_MCEERR_AR);
	TEST_ASSERT_EQ(gmem_sigbus_code(page_address(m, page), true), BUS_MCEERR_AR);
}

/* The pages on both sides of one that is bad. */
static void check_next_to(struct machine *m, uint64_t page)
{
	const uint64_t step = m->step;

	m->step = 1;
	guest_checks(m, page - 16, page);
	guest_checks(m, page + 1, page + 16);
	vmm_checks(m, page - 16, page);
	vmm_checks(m, page + 1, page + 16);
	m->step = step;
}

/* Every page but the bad one. */
static void check_all_but(struct machine *m, uint64_t page)
{
	if (m->step == 1) {
		guest_checks(m, 0, page);
		guest_checks(m, page + 1, m->npages);
		vmm_checks(m, 0, page);
		vmm_checks(m, page + 1, m->npages);
		return;
	}

	/* The bad page is none of those that are looked at in a big file. */
	TEST_ASSERT(page % m->step, "Page %lu is the bad one", page);
	check_all(m);
	check_next_to(m, page);
}

static bool seek_done;

static void *seek_thread(void *arg)
{
	struct machine *m = arg;
	const off_t last = (m->npages - 1) * PAGE_SIZE;

	while (!READ_ONCE(seek_done)) {
		TEST_ASSERT_EQ(lseek(m->fd, 0, SEEK_DATA), 0);
		TEST_ASSERT_EQ(lseek(m->fd, last, SEEK_DATA), last);
	}
	return NULL;
}

/* Whatever it takes to heal a page, the others are there all the time. */
static void punch_and_seek(struct machine *m, uint64_t page)
{
	pthread_t thread;
	int ret;

	WRITE_ONCE(seek_done, false);
	ret = pthread_create(&thread, NULL, seek_thread, m);
	TEST_ASSERT(!ret, "pthread_create() failed, %s", strerror(ret));
	punch(m, page, 1);
	WRITE_ONCE(seek_done, true);
	pthread_join(thread, NULL);
}

/* What heals one bad page doesn't make another one of the folio look healthy. */
static void test_other_poison(struct machine *m, uint64_t page, uint64_t other)
{
	fill_around(m, other);
	TEST_ASSERT(poison(m, other), "One error was injected, the other was not");
	assert_poisoned(m, page);
	assert_poisoned(m, other);

	punch_and_seek(m, page);
	check_around(m, page);
	for (int i = 0; i < 2; i++) {
		assert_poisoned(m, other);
		check_next_to(m, other);
		delete_slot(m);
		set_slot(m);
	}

	punch(m, other, 1);
	check_around(m, other);
}

static void test_poison(uint64_t flags, const struct pin *pin)
{
	const uint64_t page = 300, other = 400, pinned = 310;
	struct machine m;
	int ret;

	pr_info("Flags 0x%lx: memory error, %s\n", flags, pin ? pin->name : "nothing pinned");
	if (!create_filled_machine(&m, flags))
		return;

	fill_around(&m, page);
	check_around(&m, page);
	if (pin)
		pin->pin(&m, pinned);

	if (!poison(&m, page)) {
		if (pin)
			pin->unpin();
		free_machine(&m);
		return;
	}

	/* Also after everything has been faulted in again. */
	for (int i = 0; i < 2; i++) {
		check_all_but(&m, page);
		assert_poisoned(&m, page);
		check_all_but(&m, page);
		assert_poisoned(&m, page);
		delete_slot(&m);
		set_slot(&m);
		/* The VMM's page tables may remember what was bad, or not. */
		if (pin)
			madvise(m.mem, m.npages * PAGE_SIZE, MADV_DONTNEED);
	}

	if (pin) {
		/* It cannot be replaced under those who pinned it, and says so. */
		ret = __punch(&m, page, 1);
		TEST_ASSERT(!ret || errno == EBUSY, __KVM_SYSCALL_ERROR("fallocate()", ret));
		if (ret)
			assert_poisoned(&m, page);
		pin->verify(&m, pinned);
		pin->unpin();
	} else {
		test_other_poison(&m, page, other);
	}

	/* A hole heals, and has no side effects. */
	punch(&m, page, 1);
	check_around(&m, page);
	check_all(&m);
	m.expected[page] = 4711;
	guest_does(&m, GMEM_SET, page, 4711);
	check_around(&m, page);

	punch(&m, 0, m.npages);
	assert_empty(&m);
	check_all(&m);
	free_machine(&m);
}

/*
 * Holes race with accesses
 *
 * In each block of 2 MiB there are pages that holes are punched into, and pages
 * right next to them that everybody else is busy with.  Those keep what is
 * written to them, and once a hole has been punched, nobody may see what was in
 * its place before.  Blocks get split by that, so start over with new ones, empty
 * ones, again and again.
 */
#define RACE_BLOCKS	2
#define RACE_HOLES	4
#define RACE_SIZE	(RACE_BLOCKS * SZ_2M)
/* Holes and pages to be kept take turns, spread over the block. */
#define RACE_STRIDE	(NPAGES_2M / (2 * RACE_HOLES))
#define NR_RACE_HOLES	(RACE_BLOCKS * RACE_HOLES)

static uint64_t race_hole(int i)
{
	return 2 * i * RACE_STRIDE + 1;
}

static uint64_t race_kept(int i)
{
	return race_hole(i) + 1;
}

/* Shared with the guest: the last number whose hole is complete, by page. */
struct race {
	uint64_t punched[NR_RACE_HOLES];
	uint64_t stop;
	/* What the guest has found, or done. */
	uint64_t stale_page, stale_seen, stale_punched;
	uint64_t nr_added;
	uint64_t lost_page, lost_seen;
	uint64_t nr_read;
};

static struct race race;

/* Adds one to each page that's kept, and makes sure that none was lost. */
static void guest_race_keep(void)
{
	uint64_t round, seen;
	int i;

	race.nr_added = 0;
	for (round = 0; !READ_ONCE(race.stop); round++) {
		for (i = 0; i < NR_RACE_HOLES; i++) {
			uint64_t *word = (void *)TEST_GPA + race_kept(i) * PAGE_SIZE;

			seen = READ_ONCE(*word);
			if (seen != round && !race.lost_page) {
				race.lost_page = race_kept(i);
				race.lost_seen = seen;
			}
			asm volatile("lock incq %0" : "+m" (*word));
		}
		race.nr_added++;
	}
}

/* Reads what holes are punched into. */
static void guest_race_read(void)
{
	uint64_t punched, seen;
	int i;

	race.nr_read = 0;
	while (!READ_ONCE(race.stop)) {
		for (i = 0; i < NR_RACE_HOLES; i++) {
			uint64_t *word = (void *)TEST_GPA + race_hole(i) * PAGE_SIZE;

			punched = READ_ONCE(race.punched[i]);
			seen = READ_ONCE(*word);
			if (seen && seen <= punched && !race.stale_page) {
				race.stale_page = race_hole(i);
				race.stale_seen = seen;
				race.stale_punched = punched;
			}
		}
		race.nr_read++;
	}
}

static void guest_race_code(uint64_t vcpu_id)
{
	for (;;) {
		if (vcpu_id)
			guest_race_read();
		else
			guest_race_keep();
		GUEST_SYNC(vcpu_id);
	}
}

static struct race *host_race;
static pthread_barrier_t race_barrier;
static bool race_done;

static void *race_vcpu(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	struct ucall uc;

	for (;;) {
		pthread_barrier_wait(&race_barrier);
		if (READ_ONCE(race_done))
			return NULL;
		vcpu_run(vcpu);
		TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
		TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
		pthread_barrier_wait(&race_barrier);
	}
}

static uint64_t race_vmm_rounds;

/* The VMM does as the guest does, with another word, and through fresh mappings. */
static void *race_vmm(void *arg)
{
	struct machine *m = arg;

	for (;;) {
		uint64_t round = 0;

		pthread_barrier_wait(&race_barrier);
		if (READ_ONCE(race_done))
			return NULL;

		for (round = 0; !READ_ONCE(host_race->stop); round++) {
			for (int i = 0; i < NR_RACE_HOLES; i++) {
				uint64_t *word = page_address(m, race_kept(i)) + 1;
				uint64_t seen = READ_ONCE(*word);

				TEST_ASSERT(seen == round,
					    "VMM sees 0x%lx in page %lu, expected 0x%lx",
					    seen, race_kept(i), round);
				WRITE_ONCE(*word, round + 1);
			}
			madvise(m->mem, RACE_SIZE, MADV_DONTNEED);
		}
		race_vmm_rounds = round;
		pthread_barrier_wait(&race_barrier);
	}
}

static void race_punch(struct machine *m, uint64_t *number)
{
	for (int i = 0; i < NR_RACE_HOLES; i++) {
		uint64_t *word = page_address(m, race_hole(i)), seen;
		int ret;

		/* Every other time, there may be nothing at all in the block. */
		if (*number % 2)
			WRITE_ONCE(*word, *number);
		ret = __punch(m, race_hole(i), 1);
		TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("fallocate()", ret));
		WRITE_ONCE(host_race->punched[i], *number);
		seen = READ_ONCE(*word);
		TEST_ASSERT(!seen, "VMM sees 0x%lx in page %lu right after punching it",
			    seen, race_hole(i));
	}
	(*number)++;
}

static void test_race(uint64_t flags, int seconds)
{
	uint64_t number = 1, rounds = 0, nr_added = 0, nr_read = 0, nr_vmm = 0;
	struct kvm_vcpu *vcpus[2];
	pthread_t threads[3];
	struct timespec start;
	struct machine m;

	pr_info("Flags 0x%lx: holes race with faults, %d s\n", flags, seconds);

	create_machine_with_vcpus(&m, flags, RACE_SIZE, 2, vcpus, guest_race_code);
	host_race = addr_gva2hva(m.vm, (vm_vaddr_t)&race);
	race_done = false;
	pthread_barrier_init(&race_barrier, NULL, 4);
	pthread_create(&threads[0], NULL, race_vcpu, vcpus[0]);
	pthread_create(&threads[1], NULL, race_vcpu, vcpus[1]);
	pthread_create(&threads[2], NULL, race_vmm, &m);

	clock_gettime(CLOCK_MONOTONIC, &start);
	while (timespec_elapsed(start).tv_sec < seconds) {
		host_race->stop = false;
		pthread_barrier_wait(&race_barrier);

		race_punch(&m, &number);

		WRITE_ONCE(host_race->stop, true);
		pthread_barrier_wait(&race_barrier);

		TEST_ASSERT(!host_race->stale_page,
			    "Guest saw 0x%lx in page %lu after 0x%lx was punched, round %lu",
			    host_race->stale_seen, host_race->stale_page,
			    host_race->stale_punched, rounds);
		TEST_ASSERT(!host_race->lost_page,
			    "Guest saw 0x%lx in page %lu that nobody punched, round %lu",
			    host_race->lost_seen, host_race->lost_page, rounds);
		for (int i = 0; i < NR_RACE_HOLES; i++) {
			TEST_ASSERT_EQ(page_address(&m, race_kept(i))[0], host_race->nr_added);
			TEST_ASSERT_EQ(page_address(&m, race_kept(i))[1], race_vmm_rounds);
			TEST_ASSERT_EQ(page_address(&m, race_hole(i))[0], 0);
		}

		nr_added += host_race->nr_added;
		nr_read += host_race->nr_read;
		nr_vmm += race_vmm_rounds;
		rounds++;
		punch(&m, 0, m.npages);
		assert_empty(&m);
	}

	WRITE_ONCE(race_done, true);
	pthread_barrier_wait(&race_barrier);
	for (int i = 0; i < ARRAY_SIZE(threads); i++)
		pthread_join(threads[i], NULL);
	pthread_barrier_destroy(&race_barrier);

	pr_info("%lu rounds, %lu holes, the guest wrote %lu times and read %lu times, the VMM %lu times\n",
		rounds, (number - 1) * NR_RACE_HOLES, nr_added, nr_read, nr_vmm);
	TEST_ASSERT(nr_added && nr_read && nr_vmm, "Everybody should have gotten to do something");

	free_machine(&m);
}

/*
 * A hole races with the very first access to the block around it, i.e. the page
 * is taken out of a folio that is about to be mapped as a whole.  From then on,
 * guest and VMM must agree on what is at the hole.
 */
#define FIRST_HOLE	(NPAGES_2M / 2)
#define FIRST_TOUCHED	(FIRST_HOLE + 1)

struct first {
	uint64_t round;
	/* The rounds that the guest and the hole have got to. */
	uint64_t touching, punched, written;
};

static struct first first;

static void guest_first_code(void)
{
	uint64_t *touched = (void *)TEST_GPA + FIRST_TOUCHED * PAGE_SIZE;
	uint64_t *hole = (void *)TEST_GPA + FIRST_HOLE * PAGE_SIZE;
	uint64_t round = 0;

	for (;;) {
		while (READ_ONCE(first.round) == round)
			cpu_relax();
		round = READ_ONCE(first.round);
		if (round == ~0ULL)
			break;

		WRITE_ONCE(first.touching, round);
		WRITE_ONCE(*touched, round);
		while (READ_ONCE(first.punched) != round)
			cpu_relax();
		WRITE_ONCE(*hole, round);
		WRITE_ONCE(first.written, round);
	}
	GUEST_DONE();
}

static void *first_vcpu(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	struct ucall uc;

	vcpu_run(vcpu);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_DONE);
	return NULL;
}

static void test_race_first(uint64_t flags, int seconds)
{
	struct timespec start;
	struct kvm_vcpu *vcpu;
	struct first *host;
	pthread_t thread;
	struct machine m;
	uint64_t round;

	pr_info("Flags 0x%lx: holes race with the first access, %d s\n", flags, seconds);

	create_machine_with_vcpus(&m, flags, SZ_2M, 1, &vcpu, guest_first_code);
	host = addr_gva2hva(m.vm, (vm_vaddr_t)&first);
	pthread_create(&thread, NULL, first_vcpu, vcpu);

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (round = 1; timespec_elapsed(start).tv_sec < seconds; round++) {
		WRITE_ONCE(host->round, round);
		while (READ_ONCE(host->touching) != round)
			;
		/* Now and then somewhat later, the access is a matter of ms. */
		if (round % 2)
			usleep(round % 64 * 16);
		punch(&m, FIRST_HOLE, 1);
		WRITE_ONCE(host->punched, round);
		while (READ_ONCE(host->written) != round)
			;

		TEST_ASSERT(page_address(&m, FIRST_HOLE)[0] == round,
			    "Guest wrote 0x%lx to the hole, VMM sees 0x%lx",
			    round, page_address(&m, FIRST_HOLE)[0]);
		TEST_ASSERT(page_address(&m, FIRST_TOUCHED)[0] == round,
			    "Guest wrote 0x%lx next to the hole, VMM sees 0x%lx",
			    round, page_address(&m, FIRST_TOUCHED)[0]);
		punch(&m, 0, m.npages);
	}

	WRITE_ONCE(host->round, ~0ULL);
	pthread_join(thread, NULL);
	pr_info("%lu rounds\n", round - 1);

	free_machine(&m);
}

static void test_flags(uint64_t flags, int seconds)
{
	test_holes(flags);
	for (int i = 0; i < ARRAY_SIZE(pins); i++)
		test_hole_next_to_pin(flags, &pins[i]);

	test_poison(flags, &pins[0]);
	test_poison(flags, NULL);

	/* It's the same with 1 GiB, but takes a lot longer. */
	if (flags & GUEST_MEMFD_FLAG_HUGE_1G)
		return;

	for (int i = 0; i < ARRAY_SIZE(pins); i++)
		test_hole_over_pin(flags, &pins[i]);
	test_race(flags, seconds);
	test_race_first(flags, seconds);
}

static void help(const char *name)
{
	printf("usage: %s [-h] [-t seconds]\n", name);
	printf(" -t: How long holes race with accesses, for each size of folios (default 10).\n");
	exit(0);
}

int main(int argc, char *argv[])
{
	/* The biggest first, there's ever less contiguous memory. */
	const uint64_t all_flags[] = { GUEST_MEMFD_FLAG_HUGE_1G, GUEST_MEMFD_FLAG_HUGE_2M, 0 };
	uint64_t supported;
	int seconds = 10, opt;

	while ((opt = getopt(argc, argv, "ht:")) != -1) {
		switch (opt) {
		case 't':
			seconds = atoi_positive("Seconds", optarg);
			break;
		default:
			help(argv[0]);
		}
	}

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD_FLAGS));
	supported = kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS);
	TEST_REQUIRE(!(GMEM_SHARED & ~supported));

	for (int i = 0; i < ARRAY_SIZE(all_flags); i++) {
		if (all_flags[i] & ~supported)
			pr_info("Flags 0x%lx: not supported\n", all_flags[i]);
		else
			test_flags(all_flags[i], seconds);
	}

	if (supported & GUEST_MEMFD_FLAG_HUGE_2M) {
		test_nobody_else_touches_folios();
		test_vmm_maps_huge();
		test_tracepoints();
	}

	return 0;
}
