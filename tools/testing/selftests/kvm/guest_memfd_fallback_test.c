// SPDX-License-Identifier: GPL-2.0-only
/*
 * When there are no free blocks of 2 MiB or 1 GiB, a VM whose guest_memfd asks
 * for huge pages gets smaller ones, its fdinfo says so, and nobody is killed
 * for it.  When there are, it gets them again.
 *
 * Takes all free 2 MiB blocks of the machine for HugeTLB while it runs.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <sys/mman.h>

#include <linux/falloc.h>
#include <linux/sizes.h>

#include "gfn_probe.h"
#include "guest_memfd.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define TEST_SLOT	10
#define TEST_GPA	SZ_4G
#define TEST_SIZE	SZ_64M
/* Memory to give the machine back in single pages. */
#define CRUMBS_SIZE	(4 * TEST_SIZE)

#define GMEM_SHARED	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)
#define GMEM_2M		(GMEM_SHARED | GUEST_MEMFD_FLAG_HUGE_2M)
#define GMEM_1G		(GMEM_2M | GUEST_MEMFD_FLAG_HUGE_1G)

#define NR_HUGEPAGES	"/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"

static uint64_t read_number(const char *path, const char *key)
{
	char line[128];
	uint64_t val = 0;
	size_t len = strlen(key);
	FILE *file = fopen(path, "r");

	TEST_ASSERT(file, "Could not read %s", path);
	while (fgets(line, sizeof(line), file)) {
		if (strncmp(line, key, len))
			continue;
		val = strtoull(line + len, NULL, 0);
		break;
	}
	fclose(file);
	return val;
}

static bool write_number(const char *path, uint64_t val)
{
	FILE *file = fopen(path, "w");

	if (!file)
		return false;
	fprintf(file, "%lu\n", val);
	return !fclose(file);
}

/*
 * Leave no free block of 2 MiB, but half of CRUMBS_SIZE in single pages whose
 * neighbours cannot be moved away.  Returns the file that holds those.
 */
static int make_memory_scarce(struct kvm_vm *vm)
{
	int fd = vm_create_guest_memfd(vm, CRUMBS_SIZE, GMEM_SHARED);
	uint64_t before, after = 0;
	off_t offset;

	TEST_ASSERT(!fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, CRUMBS_SIZE),
		    __KVM_SYSCALL_ERROR("fallocate()", -1));

	/* HugeTLB gives up early. */
	do {
		before = after;
		write_number(NR_HUGEPAGES, 1 << 24);
		after = read_number(NR_HUGEPAGES, "");
	} while (after != before);

	for (offset = 0; offset < CRUMBS_SIZE; offset += 2 * getpagesize())
		TEST_ASSERT(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				       offset, getpagesize()),
			    __KVM_SYSCALL_ERROR("fallocate()", -1));
	return fd;
}

/* Start a VM, have its guest use all of TEST_SIZE, and return what's not huge. */
static size_t small_memory_of_vm(uint64_t flags)
{
	size_t file_size = flags & GUEST_MEMFD_FLAG_HUGE_1G ? SZ_1G : TEST_SIZE;
	struct gmem_work work = {
		.op = GMEM_SET,
		.gva = TEST_GPA,
		.nr = TEST_SIZE / getpagesize(),
		.stride = getpagesize(),
		.val = gmem_tag(0),
		.step = GMEM_TAG_STEP,
	};
	size_t small, large, huge;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	uint64_t *mem;
	uint64_t i;
	int fd;

	vm = __vm_create_shape_with_one_vcpu(VM_SHAPE_DEFAULT, &vcpu, 0, gmem_guest_code);
	vcpu_args_set(vcpu, 1, 0ULL);

	fd = vm_create_guest_memfd(vm, file_size, flags);
	vm_set_user_memory_region2(vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD, TEST_GPA,
				   file_size, NULL, fd, 0);
	virt_map_level(vm, TEST_GPA, TEST_GPA, TEST_SIZE, PG_LEVEL_2M);

	gmem_vcpu_run(vcpu, &work);
	work.op = GMEM_CHECK;
	gmem_vcpu_run(vcpu, &work);

	small = gmem_fdinfo(fd, "gmem_4k");
	large = gmem_fdinfo(fd, "gmem_2m");
	huge = gmem_fdinfo(fd, "gmem_1g");
	pr_info("flags 0x%lx: %zu KiB in 4 KiB, %zu KiB in 2 MiB, %zu KiB in 1 GiB\n",
		flags, small / SZ_1K, large / SZ_1K, huge / SZ_1K);
	TEST_ASSERT(small + large + huge >= TEST_SIZE, "The file holds less than was written");

	mem = gmem_mmap(fd, TEST_SIZE, 0);
	for (i = 0; i < work.nr; i++)
		TEST_ASSERT(mem[i * getpagesize() / sizeof(*mem)] == gmem_tag(i),
			    "Page %lu is not what the guest wrote", i);
	munmap(mem, TEST_SIZE);

	kvm_vm_free(vm);
	close(fd);
	return small;
}

/*
 * Looking for 1 GiB takes long and interrupts all CPUs.  When there's none, a file
 * leaves it at one attempt every two seconds, or fewer, whatever is touched.  Who
 * populates memory has the time to try.
 */
static void test_back_off(struct kvm_vm *vm)
{
	struct gfn_probe probe = {
		.function = "alloc_contig_pages_noprof",
		.arg = 1,
	};
	const uint64_t nr_pages = SZ_1G / getpagesize(), nr_blocks = 16;
	const size_t size = nr_blocks * SZ_1G;
	struct timespec start, elapsed;
	uint64_t i, per_attempt, nr;
	const char *reason;
	char *mem;
	int fd;

	reason = gfn_probe_install(&probe, nr_pages, nr_pages);
	if (reason) {
		pr_info("Attempts to find 1 GiB cannot be counted: %s\n", reason);
		return;
	}

	fd = vm_create_guest_memfd(vm, size, GMEM_1G);
	mem = gmem_mmap(fd, size, 0);

	clock_gettime(CLOCK_MONOTONIC, &start);
	WRITE_ONCE(mem[0], 1);
	/* There may be one for the node and one for any. */
	per_attempt = gfn_probe_read(&probe);
	TEST_ASSERT(per_attempt, "The first 1 GiB of the file was not asked for");

	for (i = 1; i < nr_blocks - 1; i++)
		WRITE_ONCE(mem[i * SZ_1G], 1);
	nr = gfn_probe_read(&probe);
	elapsed = timespec_elapsed(start);
	TEST_ASSERT(nr <= per_attempt * (elapsed.tv_sec / 2),
		    "%lu calls in %ld s, %lu per attempt", nr, elapsed.tv_sec, per_attempt);

	TEST_ASSERT(!fallocate(fd, FALLOC_FL_KEEP_SIZE, i * SZ_1G, getpagesize()),
		    __KVM_SYSCALL_ERROR("fallocate()", -1));
	TEST_ASSERT_EQ(gfn_probe_read(&probe), per_attempt);

	TEST_ASSERT_EQ(gmem_fdinfo(fd, "gmem_1g"), 0);
	munmap(mem, size);
	close(fd);
	gfn_probe_remove(&probe);
}

int main(void)
{
	uint64_t had, killed, flags[] = { GMEM_2M, GMEM_1G };
	struct kvm_vm *vm;
	int fd, i;

	TEST_REQUIRE((kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & GMEM_1G) == GMEM_1G);
	__TEST_REQUIRE(!access(NR_HUGEPAGES, W_OK), "HugeTLB and root needed");

	had = read_number(NR_HUGEPAGES, "");
	killed = read_number("/proc/vmstat", "oom_kill ");
	vm = vm_create_barebones();

	fd = make_memory_scarce(vm);
	for (i = 0; i < ARRAY_SIZE(flags); i++)
		TEST_ASSERT(small_memory_of_vm(flags[i]),
			    "All of it is huge, this test is none");
	test_back_off(vm);

	write_number(NR_HUGEPAGES, had);
	close(fd);
	for (i = 0; i < ARRAY_SIZE(flags); i++)
		TEST_ASSERT_EQ(small_memory_of_vm(flags[i]), 0);

	TEST_ASSERT_EQ(read_number("/proc/vmstat", "oom_kill "), killed);
	kvm_vm_free(vm);
	return 0;
}
