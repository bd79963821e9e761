// SPDX-License-Identifier: GPL-2.0-only
/*
 * How long does a guest take to touch memory that nobody has touched before?
 *
 * One vCPU writes a word to each 4 KiB page of 256 MiB (-m MIB) that are backed
 * in six ways, one after the other, five times (-r ROUNDS).  Prints the median
 * of each in ms, and its ratio to anonymous THP.  The clock runs while the vCPU
 * does, i.e. what it takes to set up the VM and to free the memory is left out.
 *
 * HugeTLB needs as many free 2 MiB pages, see /proc/sys/vm/nr_hugepages.
 */
#include <getopt.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include <linux/sizes.h>

#include "guest_memfd.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define TEST_SLOT	10
#define TEST_GPA	SZ_4G
#define GUEST_PAGE	SZ_4K
#define MAX_ROUNDS	99

#define GMEM_SHARED	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)

static const struct backing {
	const char *name;
	/* Of mmap() and madvise(), if there's no flag of a guest_memfd. */
	int mmap_flags;
	int advice;
	uint64_t gmem_flags;
	size_t page_size;
} backings[] = {
	{ "anonymous 4 KiB", 0, MADV_NOHUGEPAGE, 0, SZ_4K },
	{ "anonymous THP", 0, MADV_HUGEPAGE, 0, SZ_2M },
	{ "HugeTLB 2 MiB", MAP_HUGETLB | MAP_HUGE_2MB, MADV_NORMAL, 0, SZ_2M },
	{ "guest_memfd 4 KiB", 0, 0, GMEM_SHARED, SZ_4K },
	{ "guest_memfd 2 MiB", 0, 0, GMEM_SHARED | GUEST_MEMFD_FLAG_HUGE_2M, SZ_2M },
	{ "guest_memfd 1 GiB", 0, 0, GMEM_SHARED | GUEST_MEMFD_FLAG_HUGE_1G, SZ_1G },
};

#define THP 1

static double results[ARRAY_SIZE(backings)][MAX_ROUNDS];

static double touch(struct kvm_vcpu *vcpu, size_t size)
{
	struct gmem_work work = {
		.op = GMEM_SET,
		.gva = TEST_GPA,
		.nr = size / GUEST_PAGE,
		.stride = GUEST_PAGE,
		.val = 1,
	};
	struct timespec start, took;

	clock_gettime(CLOCK_MONOTONIC, &start);
	gmem_vcpu_run(vcpu, &work);
	took = timespec_elapsed(start);

	return took.tv_sec * 1e3 + took.tv_nsec / 1e6;
}

static double measure(const struct backing *backing, size_t size)
{
	size_t slot_size = align_up(size, backing->page_size);
	void *start = NULL, *mem = NULL;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	double took;
	int fd = -1;

	vm = __vm_create_shape_with_one_vcpu(VM_SHAPE_DEFAULT, &vcpu,
					     size / GUEST_PAGE / 64, gmem_guest_code);
	vcpu_args_set(vcpu, 1, 0ULL);

	if (backing->gmem_flags) {
		fd = vm_create_guest_memfd(vm, slot_size, backing->gmem_flags);
		vm_set_user_memory_region2(vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD,
					   TEST_GPA, slot_size, NULL, fd, 0);
	} else {
		start = mmap(NULL, slot_size + SZ_2M, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | backing->mmap_flags, -1, 0);
		TEST_ASSERT(start != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
		mem = align_ptr_up(start, SZ_2M);
		madvise(mem, slot_size, backing->advice);
		vm_set_user_memory_region(vm, TEST_SLOT, 0, TEST_GPA, slot_size, mem);
	}

	virt_map_level(vm, TEST_GPA, TEST_GPA, size, PG_LEVEL_2M);

	took = touch(vcpu, size);

	kvm_vm_free(vm);
	if (start)
		munmap(start, slot_size + SZ_2M);
	else
		close(fd);
	return took;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double median(double *values, int nr)
{
	qsort(values, nr, sizeof(*values), compare);
	return values[nr / 2];
}

int main(int argc, char *argv[])
{
	size_t size = SZ_256M;
	int rounds = 5, round, opt, i;
	double thp;

	while ((opt = getopt(argc, argv, "m:r:h")) != -1) {
		switch (opt) {
		case 'm':
			size = atoi_positive("Size in MiB", optarg) * SZ_1M;
			break;
		case 'r':
			rounds = atoi_positive("Rounds", optarg);
			break;
		default:
			printf("usage: %s [-m MIB] [-r ROUNDS]\n", argv[0]);
			return opt == 'h' ? 0 : 1;
		}
	}
	TEST_ASSERT(rounds <= MAX_ROUNDS, "At most %d rounds", MAX_ROUNDS);

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_HUGE_1G);

	/*
	 * The first round doesn't count.  If this is a VM itself, its memory may
	 * have to be found by its host first, and the first to touch it would pay.
	 */
	for (round = -1; round < rounds; round++) {
		for (i = 0; i < ARRAY_SIZE(backings); i++)
			results[i][max(round, 0)] = measure(&backings[i], size);
	}

	thp = median(results[THP], rounds);
	printf("%-18s %10s %8s   median of %d rounds, %zu MiB\n", "backing", "ms",
	       "to THP", rounds, size / SZ_1M);
	for (i = 0; i < ARRAY_SIZE(backings); i++) {
		double ms = median(results[i], rounds);

		printf("%-18s %10.1f %8.2f\n", backings[i].name, ms, ms / thp);
	}

	return 0;
}
