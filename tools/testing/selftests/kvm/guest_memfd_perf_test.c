// SPDX-License-Identifier: GPL-2.0-only
/*
 * What does memory of a guest cost, by what backs it?
 *
 * Prints comma-separated values, one sample a line: the number of the round, the
 * backing, MiB of memory, vCPUs, the name of the figure, its value.  The last word
 * of a figure's name is its unit.  Backings take turns in each round, so that
 * ratios between them don't depend on when they were measured, and in another
 * order, so that what one leaves behind doesn't always hit the same.  Huge pages
 * take little time and may be measured several times in a round.  The first round
 * is left out: if this is a VM itself, its memory may have to be found by its host
 * first, and the first to touch it would pay.
 *
 *  slot_create_us	KVM_SET_USER_MEMORY_REGION2 for all of the memory
 *  cold_ms		each vCPU writes a word to each page of its share of the
 *			memory, which nobody has touched
 *  faults		page faults that KVM handled for that; without TDP, those of
 *			the guest's page tables are among them
 *  secondary_kib	page tables of KVM that this has added, and
 *  host_kib		page tables of this process that the memory has added
 *  warm_ms		each vCPU reads a word of 262144 pages at random
 *  dirty_start_us	KVM_MEM_LOG_DIRTY_PAGES is set
 *  dirty_round_ms	each 10th page is written to, after the log was fetched
 *			once, and the log is fetched again
 *  dirty_stop_us	the flag is cleared
 *  recovery_ms		one pass of the guest, which reads a word of each page
 *  recovered_percent	how much of the memory has huge mappings then, of the size
 *			that it was mapped with before
 *  hole_ms		every other 2 MiB are given back, or 4 KiB if that's the
 *			size of the backing's pages, of 2 MiB as well
 *  slot_delete_us	the memslot is deleted
 *  populate_ms		the VMM populates new memory, by fallocate() if it's a file,
 *			else MADV_POPULATE_WRITE
 *  prefault_ms		KVM_PRE_FAULT_MEMORY of what was populated
 *
 * The guest's page tables map 2 MiB at once, as Linux' direct map does at least.
 * Needs root for HugeTLB's pages, which are given back afterwards; a backing that
 * there isn't enough memory for is skipped.
 *
 * The guest marks where a write begins and ends with no-ops that an emulator can
 * recognise, to count what KVM does in between: see set_mark().
 */
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <linux/bitmap.h>
#include <linux/falloc.h>
#include <linux/sizes.h>
#include <sys/mman.h>

#include "guest_memfd.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define TEST_SLOT	10
#define TEST_GPA	SZ_4G
#define MAX_VCPUS	8
#define WARM_READS	262144

#define GMEM_SHARED	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)
/* Where there's no 1 GiB, 2 MiB will do. */
#define GMEM_HUGE	(GUEST_MEMFD_FLAG_HUGE_2M | GUEST_MEMFD_FLAG_HUGE_1G)

enum mark {
	MARK_BEGIN = 0x67b00001,
	MARK_END,
	/* What comes next is about another backing, or of another round. */
	MARK_NEXT,
};

/* nopl mark(%rax), which no compiler would emit. */
static __always_inline void set_mark(const enum mark mark)
{
	asm volatile(".byte 0x0f, 0x1f, 0x80; .long %c0" : : "i" (mark) : "memory");
}

enum backing_type {
	BACKING_ANON,
	BACKING_MEMFD,
	BACKING_GMEM,
};

static const struct backing {
	const char *name;
	enum backing_type type;
	/* Of mmap(), memfd_create() or guest_memfd. */
	uint64_t flags;
	int advice;
	size_t page_size;
	/* The VMM maps the guest_memfd; it has to for all others. */
	bool mapped;
	/* The size of HugeTLB's pages. */
	const char *pool;
} backings[] = {
	{ "anon_4k", BACKING_ANON, 0, MADV_NOHUGEPAGE, SZ_4K, true },
	{ "anon_thp", BACKING_ANON, 0, MADV_HUGEPAGE, SZ_2M, true },
	{ "memfd_thp", BACKING_MEMFD, 0, MADV_HUGEPAGE, SZ_2M, true },
	{ "hugetlb_2m", BACKING_ANON, MAP_HUGETLB | MAP_HUGE_2MB, MADV_NORMAL, SZ_2M,
	  true, "2048kB" },
	{ "hugetlb_1g", BACKING_ANON, MAP_HUGETLB | MAP_HUGE_1GB, MADV_NORMAL, SZ_1G,
	  true, "1048576kB" },
	{ "gmem_4k", BACKING_GMEM, 0, 0, SZ_4K, false },
	{ "gmem_2m", BACKING_GMEM, GUEST_MEMFD_FLAG_HUGE_2M, 0, SZ_2M, false },
	{ "gmem_1g", BACKING_GMEM, GMEM_HUGE, 0, SZ_1G, false },
	{ "gmem_4k_mapped", BACKING_GMEM, 0, 0, SZ_4K, true },
	{ "gmem_2m_mapped", BACKING_GMEM, GUEST_MEMFD_FLAG_HUGE_2M, 0, SZ_2M, true },
	{ "gmem_1g_mapped", BACKING_GMEM, GMEM_HUGE, 0, SZ_1G, true },
};

struct memory {
	const struct backing *backing;
	size_t size;
	void *start;
	void *mem;
	int fd;
};

enum job_op {
	JOB_WRITE,
	JOB_READ,
	JOB_READ_RANDOM,
};

/*
 * What a vCPU is to do with @nr pages, every @stride-th from @first on, or random
 * ones of the @stride from @first on.
 */
struct job {
	uint64_t op;
	uint64_t first;
	uint64_t nr;
	uint64_t stride;
};

static struct job jobs[MAX_VCPUS];

struct machine {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[MAX_VCPUS];
	int nr_vcpus;
	struct memory memory;
};

static int round_nr;
static bool cold_only;

static void guest_access(uint64_t op, uint64_t *word, uint64_t val)
{
	if (op == JOB_WRITE) {
		set_mark(MARK_BEGIN);
		WRITE_ONCE(*word, val);
		set_mark(MARK_END);
	} else {
		(void)READ_ONCE(*word);
	}
}

static void guest_code(uint64_t id)
{
	struct job *job = &jobs[id];
	uint64_t i, page, random = id + 1;

	for (;;) {
		for (i = 0; i < job->nr; i++) {
			page = i * job->stride;
			if (job->op == JOB_READ_RANDOM) {
				random = random * 6364136223846793005ULL + 1442695040888963407ULL;
				page = (random >> 33) % job->stride;
			}
			guest_access(job->op, (void *)(TEST_GPA + (job->first + page) * PAGE_SIZE),
				     i + 1);
		}
		GUEST_SYNC(0);
	}
}

static void report(struct machine *m, const char *figure, double value)
{
	if (round_nr >= 0)
		printf("%d,%s,%zu,%d,%s,%g\n", round_nr, m->memory.backing->name,
		       m->memory.size / SZ_1M, m->nr_vcpus, figure, value);
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

/* Pages of HugeTLB's pool: returns how many there were before. */
static long set_pool(const char *page_size, long nr)
{
	char path[128];
	long before;
	FILE *file;

	snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/hugepages-%s/nr_hugepages",
		 page_size);
	file = fopen(path, "r+");
	if (!file)
		return -1;

	if (fscanf(file, "%ld", &before) != 1)
		before = -1;
	rewind(file);
	fprintf(file, "%ld\n", nr);
	fclose(file);
	return before;
}

/* The value of a line like "SecPageTables:  123 kB". */
static long proc_kib(const char *path, const char *key)
{
	char line[256];
	long value = 0;
	FILE *file;

	file = fopen(path, "r");
	TEST_ASSERT(file, __KVM_SYSCALL_ERROR("fopen()", -1));
	while (fgets(line, sizeof(line), file)) {
		if (!strncmp(line, key, strlen(key)) && line[strlen(key)] == ':')
			value = strtol(line + strlen(key) + 1, NULL, 0);
	}
	fclose(file);
	return value;
}

static bool alloc_memory(struct machine *m, const struct backing *backing, size_t size)
{
	struct memory *memory = &m->memory;
	int flags;

	*memory = (struct memory) { .backing = backing, .size = size, .fd = -1 };

	switch (backing->type) {
	case BACKING_ANON:
		flags = MAP_PRIVATE | MAP_ANONYMOUS | backing->flags;
		break;
	case BACKING_MEMFD:
		memory->fd = memfd_create("perf", backing->flags);
		TEST_ASSERT(memory->fd >= 0, __KVM_SYSCALL_ERROR("memfd_create()", -1));
		TEST_ASSERT(!ftruncate(memory->fd, size), __KVM_SYSCALL_ERROR("ftruncate()", -1));
		flags = MAP_SHARED;
		break;
	default:
		memory->fd = vm_create_guest_memfd(m->vm, size, GMEM_SHARED | backing->flags);
		flags = MAP_SHARED;
		break;
	}

	if (backing->mapped) {
		/* HugeTLB aligns by itself, and can't take the odd part. */
		size_t reserve = backing->flags & MAP_HUGETLB ? size : size + backing->page_size;
		void *mem;

		memory->start = mmap(NULL, reserve, PROT_NONE,
				     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		TEST_ASSERT(memory->start != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
		munmap(memory->start, reserve);
		mem = align_ptr_up(memory->start, backing->page_size);

		if (backing->type == BACKING_ANON && (backing->flags & MAP_HUGETLB))
			mem = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0);
		else
			mem = mmap(mem, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED,
				   memory->fd, 0);
		if (mem == MAP_FAILED) {
			if (memory->fd >= 0)
				close(memory->fd);
			return false;
		}
		memory->mem = mem;
		if (backing->advice != MADV_NORMAL && backing->type != BACKING_GMEM)
			madvise(mem, size, backing->advice);
	}

	return true;
}

static void free_memory(struct memory *memory)
{
	if (memory->mem)
		munmap(memory->mem, memory->size);
	if (memory->fd >= 0)
		close(memory->fd);
}

static void set_slot(struct machine *m, size_t size, uint32_t flags)
{
	struct memory *memory = &m->memory;
	int ret;

	if (memory->backing->type == BACKING_GMEM)
		ret = __vm_set_user_memory_region2(m->vm, TEST_SLOT,
						   flags | KVM_MEM_GUEST_MEMFD, TEST_GPA,
						   size, memory->mem, memory->fd, 0);
	else
		ret = __vm_set_user_memory_region2(m->vm, TEST_SLOT, flags, TEST_GPA,
						   size, memory->mem, 0, 0);
	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_SET_USER_MEMORY_REGION2, ret));
}

static double timed_set_slot(struct machine *m, size_t size, uint32_t flags)
{
	double start = now();

	set_slot(m, size, flags);
	return (now() - start) * 1e6;
}

static pthread_barrier_t barrier;

static void *vcpu_thread(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	struct ucall uc;

	pthread_barrier_wait(&barrier);
	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	return NULL;
}

/* SecPageTables counts what CPUs haven't added to the sum yet, too. */
static long secondary_kib(void)
{
	char unused;
	int fd = open("/proc/sys/vm/stat_refresh", O_RDONLY);

	if (fd >= 0) {
		(void)!read(fd, &unused, 1);
		close(fd);
	}
	return proc_kib("/proc/meminfo", "SecPageTables");
}

/* All vCPUs do the job, each with its part of the memory.  Returns milliseconds. */
static double run(struct machine *m, enum job_op op, uint64_t stride)
{
	uint64_t pages = m->memory.size / PAGE_SIZE / m->nr_vcpus;
	pthread_t threads[MAX_VCPUS];
	double start;
	int i;

	for (i = 0; i < m->nr_vcpus; i++) {
		struct job *job = addr_gva2hva(m->vm, (vm_vaddr_t)&jobs[i]);

		*job = (struct job) {
			.op = op,
			.first = i * pages,
			.nr = op == JOB_READ_RANDOM ? WARM_READS : pages / stride,
			.stride = op == JOB_READ_RANDOM ? pages : stride,
		};
	}

	if (m->nr_vcpus == 1) {
		struct ucall uc;

		start = now();
		vcpu_run(m->vcpus[0]);
		start = now() - start;
		TEST_ASSERT_EQ(get_ucall(m->vcpus[0], &uc), UCALL_SYNC);
		return start * 1e3;
	}

	pthread_barrier_init(&barrier, NULL, m->nr_vcpus + 1);
	for (i = 0; i < m->nr_vcpus; i++)
		pthread_create(&threads[i], NULL, vcpu_thread, m->vcpus[i]);
	pthread_barrier_wait(&barrier);
	start = now();
	for (i = 0; i < m->nr_vcpus; i++)
		pthread_join(threads[i], NULL);
	start = now() - start;
	pthread_barrier_destroy(&barrier);
	return start * 1e3;
}

static void create_machine(struct machine *m, int nr_vcpus, size_t size)
{
	int i;

	m->nr_vcpus = nr_vcpus;
	m->vm = __vm_create(VM_SHAPE_DEFAULT, nr_vcpus, size / SZ_2M / 256 + 64);
	for (i = 0; i < nr_vcpus; i++) {
		m->vcpus[i] = vm_vcpu_add(m->vm, i, guest_code);
		vcpu_args_set(m->vcpus[i], 1, (uint64_t)i);
	}
	/* Deleting a memslot is to zap that memslot's SPTEs only. */
	vm_enable_cap(m->vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);
	gmem_map_in_guest(m->vm, TEST_GPA, size, PG_LEVEL_2M);
}

static uint64_t faults(struct machine *m)
{
	uint64_t sum = 0;
	int i;

	for (i = 0; i < m->nr_vcpus; i++)
		sum += gmem_vcpu_stat(m->vcpus[i], "pf_taken");
	return sum;
}

static uint64_t mapped(struct machine *m, size_t page_size)
{
	return vm_get_stat(m->vm, page_size == SZ_1G ? "pages_1g" :
				  page_size == SZ_2M ? "pages_2m" : "pages_4k") * page_size;
}

static void punch_holes(struct memory *memory)
{
	size_t at;
	int ret;

	for (at = 0; at < memory->size; at += 2 * SZ_2M) {
		if (memory->fd >= 0)
			ret = fallocate(memory->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					at, SZ_2M);
		else
			ret = madvise(memory->mem + at, SZ_2M, MADV_DONTNEED);
		TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("punching a hole", ret));
	}
}

static double measure_log(struct machine *m)
{
	uint64_t pages = m->memory.size / PAGE_SIZE;
	unsigned long *log = bitmap_zalloc(pages);
	double start;

	kvm_vm_get_dirty_log(m->vm, TEST_SLOT, log);
	start = now();
	run(m, JOB_WRITE, 10);
	kvm_vm_get_dirty_log(m->vm, TEST_SLOT, log);
	start = now() - start;
	free(log);
	return start * 1e3;
}

/* From the first touch to the end. */
static void measure_life(struct machine *m)
{
	const struct backing *backing = m->memory.backing;
	size_t size = m->memory.size;
	uint64_t faults_before, huge;
	long host_before, secondary_before;
	double cold;

	host_before = proc_kib("/proc/self/status", "VmPTE");
	report(m, "slot_create_us", timed_set_slot(m, size, 0));

	/* What else the guest takes: code, stack, page tables. */
	run(m, JOB_READ, UINT_MAX);
	if (kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY)) {
		struct userspace_mem_region *rest = memslot2region(m->vm, 0);

		gmem_pre_fault(m->vcpus[0], rest->region.guest_phys_addr,
			       rest->region.memory_size);
	}
	secondary_before = secondary_kib();
	faults_before = faults(m);
	set_mark(MARK_NEXT);
	cold = run(m, JOB_WRITE, 1);
	report(m, "cold_ms", cold);
	report(m, "faults", faults(m) - faults_before);
	report(m, "secondary_kib", secondary_kib() - secondary_before);
	report(m, "host_kib", proc_kib("/proc/self/status", "VmPTE") - host_before);

	if (!cold_only) {
		run(m, JOB_READ_RANDOM, 1);
		report(m, "warm_ms", run(m, JOB_READ_RANDOM, 1));

		huge = mapped(m, backing->page_size);
		report(m, "dirty_start_us", timed_set_slot(m, size, KVM_MEM_LOG_DIRTY_PAGES));
		report(m, "dirty_round_ms", measure_log(m));
		report(m, "dirty_stop_us", timed_set_slot(m, size, 0));
		report(m, "recovery_ms", run(m, JOB_READ, 1));
		if (backing->page_size != SZ_4K && huge)
			report(m, "recovered_percent",
			       100.0 * mapped(m, backing->page_size) / huge);

		/* HugeTLB has no smaller holes than its pages. */
		if (backing->page_size != SZ_1G || backing->type == BACKING_GMEM) {
			double start = now();

			punch_holes(&m->memory);
			report(m, "hole_ms", (now() - start) * 1e3);
		}
	}

	report(m, "slot_delete_us", timed_set_slot(m, 0, 0));
}

static void measure_populate(struct machine *m)
{
	struct memory *memory = &m->memory;
	double start;
	int ret;

	set_slot(m, memory->size, 0);

	start = now();
	if (memory->fd >= 0)
		ret = fallocate(memory->fd, FALLOC_FL_KEEP_SIZE, 0, memory->size);
	else
		ret = madvise(memory->mem, memory->size, MADV_POPULATE_WRITE);
	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("populating", ret));
	report(m, "populate_ms", (now() - start) * 1e3);

	if (kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY)) {
		start = now();
		gmem_pre_fault(m->vcpus[0], TEST_GPA, memory->size);
		report(m, "prefault_ms", (now() - start) * 1e3);
	}
	set_slot(m, 0, 0);
}

static void measure(const struct backing *backing, size_t size, int nr_vcpus)
{
	long pool_before = 0;
	struct machine m;
	bool enough = true;
	int part;

	/* Less than a page costs as much as a page. */
	if (size % backing->page_size)
		return;

	if (backing->pool)
		pool_before = set_pool(backing->pool, size / backing->page_size);

	for (part = 0; part < (cold_only ? 1 : 2) && enough; part++) {
		create_machine(&m, nr_vcpus, size);
		enough = alloc_memory(&m, backing, size);
		if (enough) {
			if (part)
				measure_populate(&m);
			else
				measure_life(&m);
		}
		kvm_vm_free(m.vm);
		if (enough)
			free_memory(&m.memory);
	}

	if (!enough)
		fprintf(stderr, "%s: not enough memory for %zu MiB\n", backing->name,
			size / SZ_1M);
	if (backing->pool && pool_before >= 0)
		set_pool(backing->pool, pool_before);
}

/* Another order each time, but the same ones in each run. */
static void shuffle(int *order, int n)
{
	int i, tmp;

	for (; n > 1; n--) {
		i = random() % n;
		tmp = order[n - 1];
		order[n - 1] = order[i];
		order[i] = tmp;
	}
}

static bool wanted(const char *list, const char *name)
{
	size_t len = strlen(name);
	const char *at;

	if (!list)
		return true;

	for (at = list; (at = strstr(at, name)); at += len) {
		if ((at == list || at[-1] == ',') && (!at[len] || at[len] == ','))
			return true;
	}
	return false;
}

/* Pages of 4 KiB take long enough to be measured once. */
static void measure_each(const int *order, const char *list, int n, size_t size, int vcpus)
{
	for (int i = 0; i < ARRAY_SIZE(backings); i++) {
		const struct backing *backing = &backings[order[i]];

		if (wanted(list, backing->name) && (!n || backing->page_size != SZ_4K))
			measure(backing, size, vcpus);
	}
}

static void help(const char *name)
{
	int i;

	printf("%s [-h] [-b BACKING,...] [-c] [-m MIB] [-n TIMES] [-r ROUNDS] [-v VCPUS]\n"
	       " -b: what to measure, all by default:", name);
	for (i = 0; i < ARRAY_SIZE(backings); i++)
		printf(" %s", backings[i].name);
	printf("\n -c: no more than the first touch\n"
	       " -m: memory, a multiple of 4 MiB, default 64\n"
	       " -n: how often in a round, default 1; pages of 4 KiB only once\n"
	       " -r: rounds, default 1; one more is not reported, unless it is 0\n"
	       " -v: vCPUs that share the memory, at most %d, default 1\n", MAX_VCPUS);
}

int main(int argc, char *argv[])
{
	const char *list = NULL;
	int rounds = 1, times = 1, vcpus = 1, opt, i, n;
	int order[ARRAY_SIZE(backings)];
	size_t size = SZ_64M;

	for (i = 0; i < ARRAY_SIZE(order); i++)
		order[i] = i;

	while ((opt = getopt(argc, argv, "b:chm:n:r:v:")) != -1) {
		switch (opt) {
		case 'b':
			list = optarg;
			break;
		case 'c':
			cold_only = true;
			break;
		case 'm':
			size = (size_t)atoi_positive("Size in MiB", optarg) * SZ_1M;
			break;
		case 'n':
			times = atoi_positive("Times", optarg);
			break;
		case 'r':
			rounds = atoi_non_negative("Rounds", optarg);
			break;
		case 'v':
			vcpus = atoi_positive("vCPUs", optarg);
			break;
		default:
			help(argv[0]);
			return opt == 'h' ? 0 : 1;
		}
	}
	TEST_ASSERT(size % (2 * SZ_2M) == 0, "Memory must be a multiple of 4 MiB");
	TEST_ASSERT(vcpus <= MAX_VCPUS, "At most %d vCPUs", MAX_VCPUS);

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_HUGE_1G);
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_GUEST_MEMFD_SLOTS) & KVM_GUEST_MEMFD_SLOTS_LOG_DIRTY);

	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("round,backing,mib,vcpus,figure,value\n");
	/* -1 isn't reported, and is all there is without rounds. */
	for (round_nr = rounds ? -1 : 0; round_nr < max(rounds, 1); round_nr++) {
		for (n = 0; n < times; n++) {
			if (rounds)
				shuffle(order, ARRAY_SIZE(order));
			measure_each(order, list, n, size, vcpus);
		}
	}

	return 0;
}
