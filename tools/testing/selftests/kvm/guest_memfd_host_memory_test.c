// SPDX-License-Identifier: GPL-2.0-only
/*
 * What guest_memfd's memory is to the host: it's charged to who asks for it,
 * stays where it is, and is given back when the last user is gone.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <linux/falloc.h>
#include <linux/kernel-page-flags.h>
#include <linux/sizes.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "guest_memfd.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define TEST_SLOT	10
#define TEST_GPA	SZ_4G
#define TEST_SIZE	SZ_64M

#define GMEM_SHARED	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)
#define GMEM_2M		(GMEM_SHARED | GUEST_MEMFD_FLAG_HUGE_2M)

#define CGROUPS		"/sys/fs/cgroup"
#define CGROUP		CGROUPS "/guest_memfd_host_memory"
#define MEMORY		"/sys/devices/system/memory"

struct machine {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	int fd;
	size_t size;
	uint64_t *mem;
};

/* Returns zero or an errno. */
static int write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY), err = 0;

	if (fd < 0)
		return errno;
	if (write(fd, text, strlen(text)) < 0)
		err = errno;
	close(fd);
	return err;
}

/* The first number behind @key. */
static uint64_t read_number(const char *path, const char *key, int base)
{
	char line[128];
	uint64_t val = 0;
	FILE *file = fopen(path, "r");

	TEST_ASSERT(file, "Cannot read %s, %s", path, strerror(errno));
	while (fgets(line, sizeof(line), file)) {
		if (strncmp(line, key, strlen(key)))
			continue;
		val = strtoull(line + strlen(key), NULL, base);
		break;
	}
	fclose(file);
	return val;
}

static void create_machine(struct machine *m, uint64_t flags, size_t size)
{
	m->size = size;
	m->vm = __vm_create_shape_with_one_vcpu(VM_SHAPE_DEFAULT, &m->vcpu, 0, gmem_guest_code);
	vcpu_args_set(m->vcpu, 1, 0ULL);
	m->fd = vm_create_guest_memfd(m->vm, size, flags);
	m->mem = gmem_mmap(m->fd, size, 0);
	vm_set_user_memory_region2(m->vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD, TEST_GPA,
				   size, NULL, m->fd, 0);
	virt_map_level(m->vm, TEST_GPA, TEST_GPA, TEST_SIZE, PG_LEVEL_2M);
}

static void free_machine(struct machine *m)
{
	munmap(m->mem, m->size);
	close(m->fd);
	kvm_vm_free(m->vm);
}

static void guest_does(struct machine *m, enum gmem_op op)
{
	struct gmem_work work = {
		.op = op,
		.gva = TEST_GPA,
		.nr = TEST_SIZE / PAGE_SIZE,
		.stride = PAGE_SIZE,
		.val = gmem_tag(0),
		.step = GMEM_TAG_STEP,
	};

	gmem_vcpu_run(m->vcpu, &work);
}

/*
 * memcg
 */

static bool create_cgroup(const char *limit)
{
	write_file(CGROUPS "/cgroup.subtree_control", "+memory");
	mkdir(CGROUP, 0700);
	if (write_file(CGROUP "/memory.max", limit)) {
		rmdir(CGROUP);
		pr_info("There is no memcg, skipping\n");
		return false;
	}
	return true;
}

/* Uncharging happens in batches, and late. */
static bool cgroup_is_empty(void)
{
	for (int i = 0; i < 100; i++) {
		if (read_number(CGROUP "/memory.current", "", 10) < SZ_1M)
			return true;
		usleep(50000);
	}
	return false;
}

/* Populate the file as a member of the cgroup.  Returns the status of the child. */
static int populate_in_cgroup(struct machine *m, size_t size)
{
	int status;
	pid_t pid;

	pid = fork();
	TEST_ASSERT(pid >= 0, __KVM_SYSCALL_ERROR("fork()", pid));
	if (!pid) {
		if (write_file(CGROUP "/cgroup.procs", "0"))
			_exit(EXIT_FAILURE);
		if (fallocate(m->fd, FALLOC_FL_KEEP_SIZE, 0, size))
			_exit(errno);
		_exit(0);
	}
	TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
	return status;
}

enum payer {
	PAYS_BY_FALLOCATE,
	PAYS_BY_VMM_FAULT,
	PAYS_BY_GUEST_FAULT,
	NR_PAYERS,
};

/* Whoever causes the allocation pays for the folio, however big it is. */
static void test_charge(uint64_t flags, size_t size, enum payer payer)
{
	static const char * const names[] = { "fallocate()", "the VMM", "the guest" };
	uint64_t charged, held;
	struct machine m;
	size_t i;

	pr_info("Flags 0x%lx: memory is charged, by %s\n", flags, names[payer]);
	if (!create_cgroup("max"))
		return;

	create_machine(&m, flags, size);
	switch (payer) {
	case PAYS_BY_FALLOCATE:
		TEST_ASSERT_EQ(populate_in_cgroup(&m, size), 0);
		break;
	case PAYS_BY_VMM_FAULT:
		TEST_ASSERT(!write_file(CGROUP "/cgroup.procs", "0"), "Cannot join");
		for (i = 0; i < TEST_SIZE; i += PAGE_SIZE)
			READ_ONCE(*(char *)((void *)m.mem + i));
		break;
	default:
		TEST_ASSERT(!write_file(CGROUP "/cgroup.procs", "0"), "Cannot join");
		guest_does(&m, GMEM_SET);
		break;
	}
	/* What was charged stays charged. */
	TEST_ASSERT(!write_file(CGROUPS "/cgroup.procs", "0"), "Cannot leave");

	held = gmem_fdinfo(m.fd, "gmem_4k") + gmem_fdinfo(m.fd, "gmem_2m") +
	       gmem_fdinfo(m.fd, "gmem_1g");
	charged = read_number(CGROUP "/memory.current", "", 10);
	TEST_ASSERT(held >= TEST_SIZE && charged >= held,
		    "%lu bytes were charged, the file holds %lu", charged, held);
	guest_does(&m, GMEM_SET);
	guest_does(&m, GMEM_CHECK);
	free_machine(&m);
	TEST_ASSERT(cgroup_is_empty(), "%lu bytes are still charged",
		    read_number(CGROUP "/memory.current", "", 10));
	rmdir(CGROUP);
}

/* At the limit, there are smaller pages, and then the same end as for any memory. */
static void test_limit(uint64_t flags)
{
	uint64_t small, all;
	struct machine m;
	int status;

	pr_info("Flags 0x%lx: memory is limited\n", flags);
	if (!create_cgroup("9M"))
		return;

	create_machine(&m, flags, TEST_SIZE);
	status = populate_in_cgroup(&m, TEST_SIZE);
	TEST_ASSERT((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) ||
		    (WIFEXITED(status) && WEXITSTATUS(status) == ENOMEM),
		    "Child ended with status 0x%x", status);

	small = gmem_fdinfo(m.fd, "gmem_4k");
	all = small + gmem_fdinfo(m.fd, "gmem_2m");
	TEST_ASSERT(small, "There are no pages of 4 KiB, i.e. there was no fallback");
	TEST_ASSERT(all <= 9 * SZ_1M, "The file holds %lu bytes, the limit is 9 MiB", all);

	/* Who is not a member has no such limit, and pays for the rest. */
	guest_does(&m, GMEM_SET);
	guest_does(&m, GMEM_CHECK);
	free_machine(&m);
	TEST_ASSERT(cgroup_is_empty(), "%lu bytes are still charged",
		    read_number(CGROUP "/memory.current", "", 10));
	rmdir(CGROUP);
}

static void punch(struct machine *m, off_t offset, off_t len)
{
	int ret = fallocate(m->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, len);

	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("fallocate()", ret));
}

/*
 * Memory stays where it is
 */

static uint64_t pfn_of(void *mem)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry;

	TEST_ASSERT(fd >= 0, __KVM_SYSCALL_ERROR("open()", fd));
	TEST_ASSERT_EQ(pread(fd, &entry, sizeof(entry),
			     (uint64_t)mem / PAGE_SIZE * sizeof(entry)), sizeof(entry));
	close(fd);
	return entry & GENMASK_ULL(54, 0);
}

static uint64_t flags_of_pfn(uint64_t pfn)
{
	int fd = open("/proc/kpageflags", O_RDONLY);
	uint64_t flags;

	TEST_ASSERT(fd >= 0, __KVM_SYSCALL_ERROR("open()", fd));
	TEST_ASSERT_EQ(pread(fd, &flags, sizeof(flags), pfn * sizeof(flags)), sizeof(flags));
	close(fd);
	return flags;
}

static void on_alarm(int signal)
{
}

static int offline(uint64_t block)
{
	char path[128];
	int err;

	snprintf(path, sizeof(path), MEMORY "/memory%lu/state", block);
	alarm(20);
	err = write_file(path, "offline");
	alarm(0);
	return err;
}

/* The file keeps the bad page.  If it's all there is, so is the block. */
static void test_offline_bad(struct machine *m, uint64_t block, void *bad)
{
	off_t offset = bad - (void *)m->mem;
	int err = gmem_inject_memory_error(bad);

	if (err == EINVAL || err == EPERM) {
		pr_info("Cannot inject memory errors, %s\n", strerror(err));
		return;
	}
	TEST_ASSERT(!err, "madvise(MADV_HWPOISON) failed, %s", strerror(err));

	punch(m, 0, offset);
	punch(m, offset + PAGE_SIZE, m->size - offset - PAGE_SIZE);
	TEST_ASSERT_EQ(gmem_fdinfo(m->fd, "gmem_4k"), PAGE_SIZE);

	err = offline(block);
	TEST_ASSERT(err == EBUSY,
		    "Block %lu going offline with a bad page: errno %d, expected EBUSY",
		    block, err);
	TEST_ASSERT_EQ(gmem_sigbus_code(bad, false), BUS_MCEERR_AR);
}

/*
 * Whoever takes memory offline is refused, rather than kept busy.  The file is
 * big enough to have blocks of memory to itself, as a block that has anything
 * else that's unmovable is refused anyway.
 */
static void test_offline(uint64_t flags, size_t size)
{
	uint64_t block, tried = -1ULL, mostly = 0, nr = 0, most = 0;
	void *bad = NULL;
	struct machine m;
	int err = 0;
	size_t i;

	pr_info("Flags 0x%lx: memory goes offline\n", flags);
	if (access(MEMORY "/block_size_bytes", R_OK)) {
		pr_info("Memory can't go offline, skipping\n");
		return;
	}

	create_machine(&m, flags, size);
	if (fallocate(m.fd, FALLOC_FL_KEEP_SIZE, 0, size)) {
		pr_info("Not enough memory, skipping\n");
		free_machine(&m);
		return;
	}
	guest_does(&m, GMEM_SET);

	sigaction(SIGALRM, &(struct sigaction){ .sa_handler = on_alarm }, NULL);
	for (i = 0; i < size; i += SZ_2M) {
		void *page = (void *)m.mem + i;

		READ_ONCE(*(char *)page);
		block = pfn_of(page) * PAGE_SIZE / read_number(MEMORY "/block_size_bytes", "", 16);
		if (block != tried) {
			/* EINVAL: it can't, whatever is in it, as there's a hole. */
			err = offline(block);
			TEST_ASSERT(err == EBUSY || err == EINVAL,
				    "Block %lu going offline: errno %d, expected EBUSY",
				    block, err);
			TEST_ASSERT_EQ(pfn_of(page) * PAGE_SIZE /
				       read_number(MEMORY "/block_size_bytes", "", 16), block);
			tried = block;
			nr = 0;
		}
		/* What is mostly the file's has the least of anybody else's in it. */
		if (++nr > most && err == EBUSY) {
			most = nr;
			mostly = block;
			bad = page;
		}
	}

	guest_does(&m, GMEM_CHECK);
	if (bad && flags == GMEM_SHARED)
		test_offline_bad(&m, mostly, bad);
	free_machine(&m);
}

static void test_compaction(uint64_t flags)
{
	struct machine m;
	uint64_t pfn;

	pr_info("Flags 0x%lx: memory is compacted\n", flags);
	create_machine(&m, flags, TEST_SIZE);
	guest_does(&m, GMEM_SET);
	READ_ONCE(*m.mem);
	pfn = pfn_of(m.mem);
	write_file("/proc/sys/vm/compact_memory", "1");
	TEST_ASSERT_EQ(pfn_of(m.mem), pfn);
	guest_does(&m, GMEM_CHECK);
	free_machine(&m);
}

/*
 * A read by the VMM maps what is around it, but adds nothing to the file, and a
 * page with a memory error is left out.
 */
#define HOLE	5
#define BAD	7
#define GROUP	16

#define FAULT_AROUND	"/sys/kernel/debug/fault_around_bytes"

/* Off by a page, so that it's not mapped by PMDs. */
static char *map_off(struct machine *m, void **reserved)
{
	char *mem;

	*reserved = mmap(NULL, m->size + SZ_4M, PROT_NONE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(*reserved != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));

	mem = (char *)align_ptr_up(*reserved, SZ_2M) + PAGE_SIZE;
	mem = mmap(mem, m->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, m->fd, 0);
	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	return mem;
}

static uint64_t read_page(char *mem, uint64_t page)
{
	return READ_ONCE(*(uint64_t *)(mem + page * PAGE_SIZE));
}

static void test_fault_around(uint64_t flags)
{
	const bool holes = !(flags & GUEST_MEMFD_FLAG_HUGE_2M);
	const uint64_t nr = TEST_SIZE / PAGE_SIZE;
	struct rusage before, after;
	uint64_t held, faults;
	void *reserved;
	struct machine m;
	char *mem;
	int ret;

	pr_info("Flags 0x%lx: the VMM reads what the guest has written\n", flags);
	create_machine(&m, flags, TEST_SIZE);
	guest_does(&m, GMEM_SET);
	for (uint64_t i = HOLE; holes && i < nr; i += GROUP)
		punch(&m, i * PAGE_SIZE, PAGE_SIZE);
	held = gmem_fdinfo(m.fd, "gmem_4k") + gmem_fdinfo(m.fd, "gmem_2m");

	mem = map_off(&m, &reserved);
	getrusage(RUSAGE_SELF, &before);
	for (uint64_t i = 0; i < nr; i++) {
		if (!holes || i % GROUP != HOLE)
			TEST_ASSERT_EQ(read_page(mem, i), gmem_tag(i));
	}
	getrusage(RUSAGE_SELF, &after);
	TEST_ASSERT_EQ(gmem_fdinfo(m.fd, "gmem_4k") + gmem_fdinfo(m.fd, "gmem_2m"), held);

	faults = after.ru_minflt - before.ru_minflt;
	if (access(FAULT_AROUND, R_OK) || read_number(FAULT_AROUND, "", 10) >= GROUP * PAGE_SIZE)
		TEST_ASSERT(faults < nr / 4, "%lu faults for %lu pages", faults, nr);

	ret = gmem_inject_memory_error(mem + BAD * PAGE_SIZE);
	munmap(reserved, m.size + SZ_4M);
	if (ret == EINVAL || ret == EPERM) {
		pr_info("Cannot inject memory errors, %s\n", strerror(ret));
		goto out;
	}

	/* Nothing is mapped, yet. */
	mem = map_off(&m, &reserved);
	for (uint64_t i = 0; i < HOLE; i++)
		TEST_ASSERT_EQ(read_page(mem, i), gmem_tag(i));
	TEST_ASSERT_EQ(gmem_sigbus_code(mem + BAD * PAGE_SIZE, false), BUS_MCEERR_AR);
	TEST_ASSERT_EQ(read_page(mem, BAD + 1), gmem_tag(BAD + 1));
	munmap(reserved, m.size + SZ_4M);
out:
	free_machine(&m);
}

/*
 * The last user, whoever that is, gives it back
 */

static void put_fd(struct machine *m)
{
	close(m->fd);
}

static void put_view(struct machine *m)
{
	munmap(m->mem, m->size);
}

static void put_vm(struct machine *m)
{
	kvm_vm_free(m->vm);
}

static void test_release(uint64_t flags)
{
	static void (* const users[])(struct machine *m) = { put_fd, put_view, put_vm };
	static const int orders[][3] = {
		{ 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 }, { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 },
	};
	struct machine m;

	pr_info("Flags 0x%lx: memory is given back\n", flags);
	for (int i = 0; i < ARRAY_SIZE(orders); i++) {
		if (!create_cgroup("max"))
			return;
		create_machine(&m, flags, TEST_SIZE);
		TEST_ASSERT_EQ(populate_in_cgroup(&m, TEST_SIZE), 0);
		guest_does(&m, GMEM_SET);
		guest_does(&m, GMEM_CHECK);
		for (int j = 0; j < ARRAY_SIZE(users); j++)
			users[orders[i][j]](&m);
		TEST_ASSERT(cgroup_is_empty(), "%lu bytes are still charged, order %d",
			    read_number(CGROUP "/memory.current", "", 10), i);
		rmdir(CGROUP);
	}
}

/*
 * A page that has a memory error is not given back, and may keep the folio around
 * it from that.  Then it's nobody's: not charged, and no memory that waits for being
 * moved.
 */
static void test_bad_memory(uint64_t flags, size_t size)
{
	uint64_t block = 0, block_size = 0, bad_pfn, page_flags;
	struct machine m;
	char *bad;
	int err;

	pr_info("Flags 0x%lx: bad memory is given up\n", flags);
	if (!create_cgroup("max"))
		return;

	create_machine(&m, flags, size);
	if (populate_in_cgroup(&m, size)) {
		pr_info("Not enough memory, skipping\n");
		goto out;
	}
	if (flags & GUEST_MEMFD_FLAG_HUGE_1G && !gmem_fdinfo(m.fd, "gmem_1g"))
		pr_info("There's no 1 GiB in one piece, i.e. nothing to be kept\n");
	READ_ONCE(*m.mem);
	bad = (char *)m.mem + size - PAGE_SIZE;
	READ_ONCE(*bad);
	bad_pfn = pfn_of(bad);
	if (!access(MEMORY "/block_size_bytes", R_OK)) {
		block_size = read_number(MEMORY "/block_size_bytes", "", 16);
		block = pfn_of(m.mem) * PAGE_SIZE / block_size;
	}

	/* Something else than what the block is about. */
	err = gmem_inject_memory_error(bad);
	if (err == EINVAL || err == EPERM) {
		pr_info("Cannot inject memory errors, %s\n", strerror(err));
		goto out;
	}

	free_machine(&m);
	TEST_ASSERT(cgroup_is_empty(), "%lu bytes are still charged",
		    read_number(CGROUP "/memory.current", "", 10));
	rmdir(CGROUP);

	page_flags = flags_of_pfn(bad_pfn);
	TEST_ASSERT((page_flags & BIT(KPF_HWPOISON)) && !(page_flags & BIT(KPF_BUDDY)),
		    "The bad page's flags are 0x%lx, it should be poisoned and not free",
		    page_flags);

	/* If it was given back, it may go offline, or have somebody else's memory. */
	if (!block_size || size < block_size)
		return;
	err = offline(block);
	TEST_ASSERT(!err || err == EBUSY || err == EINVAL,
		    "Block %lu going offline: errno %d, expected EBUSY", block, err);
	return;
out:
	free_machine(&m);
	rmdir(CGROUP);
}

int main(void)
{
	static const uint64_t all_flags[] = { GMEM_SHARED, GMEM_2M };
	uint64_t supported;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD_FLAGS));
	supported = kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS);
	TEST_REQUIRE((supported & GMEM_SHARED) == GMEM_SHARED);
	__TEST_REQUIRE(!geteuid(), "Root needed");

	for (int i = 0; i < ARRAY_SIZE(all_flags); i++) {
		if (all_flags[i] & ~supported)
			continue;
		for (int payer = 0; payer < NR_PAYERS; payer++)
			test_charge(all_flags[i], TEST_SIZE, payer);
		test_limit(all_flags[i]);
		test_offline(all_flags[i], SZ_512M);
		test_compaction(all_flags[i]);
		test_fault_around(all_flags[i]);
		test_release(all_flags[i]);
		test_bad_memory(all_flags[i], TEST_SIZE);
	}

	if (supported & GUEST_MEMFD_FLAG_HUGE_1G) {
		for (int payer = 0; payer < NR_PAYERS; payer++)
			test_charge(GMEM_2M | GUEST_MEMFD_FLAG_HUGE_1G, SZ_1G, payer);
		test_offline(GMEM_2M | GUEST_MEMFD_FLAG_HUGE_1G, SZ_1G);
		test_bad_memory(GMEM_2M | GUEST_MEMFD_FLAG_HUGE_1G, SZ_1G);
	}

	return 0;
}
