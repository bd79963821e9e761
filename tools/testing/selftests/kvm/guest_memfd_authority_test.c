// SPDX-License-Identifier: GPL-2.0
/*
 * What happens to the host's mapping doesn't reach the guest, and KVM's own
 * accesses to guest memory don't go through it.
 *
 * All memory of all VMs here is guest_memfd.  KVM isn't told where the test maps
 * it: userspace_addr is zero, or, for the memory that KVM is made to access, the
 * address of a decoy that must never be touched.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <asm/kvm_para.h>
#include <asm/pvclock-abi.h>
#include <linux/falloc.h>
#include <linux/mman.h>
#include <linux/sizes.h>
#include <linux/stddef.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "apic.h"
#include "guest_memfd.h"
#include "hyperv.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "svm_util.h"
#include "test_util.h"
#include "vmx.h"

#define GMEM_SHARED	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)
#define GMEM_2M		(GMEM_SHARED | GUEST_MEMFD_FLAG_HUGE_2M)

/* The memory that tests are about, mapped by the guest as it is. */
#define AREA_GPA	(4ULL << 30)
#define AREA_SLOT	10
#define AREA_SIZE	SZ_2M

/* More of it, in another file and memslot. */
#define AREA2_GPA	(AREA_GPA + SZ_1G)
#define AREA2_SLOT	11

#define DECOY_BYTE	0xdd

struct area {
	uint64_t gpa;
	uint32_t slot;
	int fd;
	void *mem;
	void *decoy;
};

struct machine {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct area area, area2;
};

static void add_area(struct machine *m, struct area *area, uint64_t gpa, uint32_t slot,
		     uint64_t flags, bool decoy)
{
	area->gpa = gpa;
	area->slot = slot;
	area->fd = vm_create_guest_memfd(m->vm, AREA_SIZE, flags);
	area->mem = gmem_mmap(area->fd, AREA_SIZE, 0);
	if (decoy) {
		area->decoy = mmap(NULL, AREA_SIZE, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		TEST_ASSERT(area->decoy != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
		memset(area->decoy, DECOY_BYTE, AREA_SIZE);
	}
	vm_set_user_memory_region2(m->vm, slot, KVM_MEM_GUEST_MEMFD, gpa, AREA_SIZE,
				   area->decoy, area->fd, 0);
	virt_map(m->vm, gpa, gpa, AREA_SIZE / PAGE_SIZE);
}

static void create_machine(struct machine *m, void *code, bool decoy)
{
	memset(m, 0, sizeof(*m));
	m->vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, 1, 1024, code, &m->vcpu);
	add_area(m, &m->area, AREA_GPA, AREA_SLOT, GMEM_2M, decoy);
	add_area(m, &m->area2, AREA2_GPA, AREA2_SLOT, GMEM_2M, decoy);
}

static void free_area(struct area *area)
{
	if (area->decoy) {
		for (uint64_t i = 0; i < AREA_SIZE; i++)
			TEST_ASSERT(((uint8_t *)area->decoy)[i] == DECOY_BYTE,
				    "KVM has written 0x%x to userspace_addr + 0x%lx",
				    ((uint8_t *)area->decoy)[i], i);
		munmap(area->decoy, AREA_SIZE);
	}
	munmap(area->mem, AREA_SIZE);
	close(area->fd);
}

static void free_machine(struct machine *m)
{
	kvm_vm_free(m->vm);
	free_area(&m->area);
	free_area(&m->area2);
}

static void punch(int fd, uint64_t offset, uint64_t size)
{
	int ret = fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, size);

	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("fallocate()", ret));
}

/* Run until the guest calls, and return if it's done. */
static bool run(struct kvm_vcpu *vcpu)
{
	struct ucall uc;

	vcpu_run(vcpu);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);

	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		return false;
	case UCALL_DONE:
		return true;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
	default:
		TEST_FAIL("Unexpected ucall %lu", uc.cmd);
	}
	return true;
}

static void guest_idle(void)
{
	for (;;)
		GUEST_SYNC(0);
}

/*
 * A4: events of the host's mapping
 */

#define BIG_SIZE	SZ_64M
#define NR_2M		((uint64_t)(BIG_SIZE / SZ_2M))

struct view {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	int fd;
	/* What userspace_addr is.  It may be mapped otherwise, or not at all. */
	void *addr;
	uint64_t background;
};

static void view_map(struct view *v)
{
	void *mem = mmap(v->addr, BIG_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
			 v->fd, 0);

	TEST_ASSERT(mem == v->addr, __KVM_SYSCALL_ERROR("mmap()", -1));
	for (uint64_t i = 0; i < BIG_SIZE; i += PAGE_SIZE)
		(void)READ_ONCE(*(uint64_t *)(v->addr + i));
}

static void view_munmap(struct view *v)
{
	munmap(v->addr, BIG_SIZE);
}

static void view_map_other(struct view *v)
{
	void *mem = mmap(v->addr, BIG_SIZE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	TEST_ASSERT(mem == v->addr, __KVM_SYSCALL_ERROR("mmap()", -1));
}

static void view_mprotect_none(struct view *v)
{
	mprotect(v->addr, BIG_SIZE, PROT_NONE);
}

static void view_mprotect_read(struct view *v)
{
	mprotect(v->addr, BIG_SIZE, PROT_READ);
}

static void view_mremap(struct view *v)
{
	void *mem = mmap(NULL, BIG_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	mem = mremap(v->addr, BIG_SIZE, BIG_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, mem);
	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mremap()", -1));
	munmap(mem, BIG_SIZE);
}

static void view_dontneed(struct view *v)
{
	madvise(v->addr, BIG_SIZE, MADV_DONTNEED);
}

static void view_pageout(struct view *v)
{
	madvise(v->addr, BIG_SIZE, MADV_PAGEOUT);
}

static void view_cold(struct view *v)
{
	madvise(v->addr, BIG_SIZE, MADV_COLD);
}

static void view_collapse(struct view *v)
{
	madvise(v->addr, BIG_SIZE, MADV_COLLAPSE);
}

static void view_mbind(struct view *v)
{
	unsigned long node = 2;

	mbind(v->addr, BIG_SIZE, MPOL_BIND, &node, 8 * sizeof(node), MPOL_MF_MOVE);
	node = 1;
	mbind(v->addr, BIG_SIZE, MPOL_BIND, &node, 8 * sizeof(node), MPOL_MF_MOVE);
	mbind(v->addr, BIG_SIZE, MPOL_DEFAULT, NULL, 0, 0);
}

static void view_migrate_pages(struct view *v)
{
	unsigned long from = 1, to = 2;

	migrate_pages(0, 8 * sizeof(from), &from, &to);
	migrate_pages(0, 8 * sizeof(from), &to, &from);
}

/* Write to what every process' pages have: a bit that says that it was used. */
static void view_clear_refs(struct view *v)
{
	int fd = open("/proc/self/clear_refs", O_WRONLY), ret;

	TEST_ASSERT(fd >= 0, __KVM_SYSCALL_ERROR("open()", fd));
	ret = write(fd, "1", 1);
	TEST_ASSERT(ret == 1, __KVM_SYSCALL_ERROR("write()", ret));
	close(fd);
}

static void view_other_process(struct view *v)
{
	int status;
	pid_t pid;

	pid = fork();
	TEST_ASSERT(pid >= 0, __KVM_SYSCALL_ERROR("fork()", pid));
	if (!pid) {
		view_map(v);
		_exit(0);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The child failed");
}

static void view_nothing(struct view *v)
{
}

/* The guest's 2 MiB mappings of the memslot, given all else that it has mapped. */
static uint64_t view_pages(struct view *v)
{
	return vm_get_stat(v->vm, "pages_2m") - v->background;
}

static void guest_touches(struct view *v, enum gmem_op op)
{
	struct gmem_work work = {
		.op = op,
		.gva = AREA_GPA,
		.nr = BIG_SIZE / PAGE_SIZE,
		.stride = PAGE_SIZE,
		.val = gmem_tag(0),
		.step = GMEM_TAG_STEP,
	};

	gmem_vcpu_run(v->vcpu, &work);
}

static void view_set_slot(struct view *v, bool present)
{
	vm_set_user_memory_region2(v->vm, AREA_SLOT, KVM_MEM_GUEST_MEMFD, AREA_GPA,
				   present ? BIG_SIZE : 0, v->addr, v->fd, 0);
}

/* Deleting a memslot zaps everything, have all that isn't ours come back first. */
static void view_start_over(struct view *v)
{
	view_set_slot(v, false);
	view_set_slot(v, true);
	gmem_vcpu_run(v->vcpu, &(struct gmem_work){ .nr = 0 });
	gmem_vcpu_run(v->vcpu, &(struct gmem_work){ .nr = 0 });
	v->background = vm_get_stat(v->vm, "pages_2m");
}

static void test_host_mapping(void)
{
	static const struct {
		const char *name;
		void (*fn)(struct view *v);
	} events[] = {
		{ "nothing", view_nothing },
		{ "munmap()", view_munmap },
		{ "mapping something else", view_map_other },
		{ "mprotect(PROT_NONE)", view_mprotect_none },
		{ "mprotect(PROT_READ)", view_mprotect_read },
		{ "mremap()", view_mremap },
		{ "MADV_DONTNEED", view_dontneed },
		{ "MADV_PAGEOUT", view_pageout },
		{ "MADV_COLD", view_cold },
		{ "MADV_COLLAPSE", view_collapse },
		{ "mbind(MPOL_MF_MOVE)", view_mbind },
		{ "migrate_pages()", view_migrate_pages },
		{ "clearing referenced bits", view_clear_refs },
		{ "the exit of another process", view_other_process },
	};
	struct view view = {}, *v = &view;
	uint64_t nr;
	void *mem;

	pr_info("A4: events of the host's mapping\n");

	v->vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, 1, 1024, gmem_guest_code, &v->vcpu);
	vcpu_args_set(v->vcpu, 1, (uint64_t)0);
	virt_map_level(v->vm, AREA_GPA, AREA_GPA, BIG_SIZE, PG_LEVEL_2M);
	v->fd = vm_create_guest_memfd(v->vm, BIG_SIZE, GMEM_2M);
	mem = mmap(NULL, BIG_SIZE + SZ_2M, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	v->addr = align_ptr_up(mem, SZ_2M);
	view_set_slot(v, true);

	view_map(v);
	guest_touches(v, GMEM_SET);
	TEST_ASSERT_EQ(gmem_fdinfo(v->fd, "gmem_2m"), BIG_SIZE);

	for (int i = 0; i < ARRAY_SIZE(events); i++) {
		view_map(v);
		view_start_over(v);
		guest_touches(v, GMEM_CHECK);
		nr = view_pages(v);
		TEST_ASSERT(nr == NR_2M, "%lu SPTEs of 2 MiB before %s", nr, events[i].name);

		events[i].fn(v);
		nr = view_pages(v);
		TEST_ASSERT(nr == NR_2M, "%lu SPTEs of 2 MiB after %s, expected %lu", nr,
			    events[i].name, NR_2M);

		/* As it happened, so be it: what the guest gets now is the same. */
		view_start_over(v);
		guest_touches(v, GMEM_CHECK);
		nr = view_pages(v);
		TEST_ASSERT(nr == NR_2M, "%lu fresh SPTEs of 2 MiB after %s", nr,
			    events[i].name);
	}

	/* The file's own events do reach the guest. */
	punch(v->fd, 3 * SZ_2M, PAGE_SIZE);
	TEST_ASSERT_EQ(view_pages(v), NR_2M - 1);
	punch(v->fd, 4 * SZ_2M, 2 * SZ_2M);
	TEST_ASSERT_EQ(view_pages(v), NR_2M - 3);
	view_map(v);
	TEST_ASSERT(!madvise(v->addr + 8 * SZ_2M, SZ_2M, MADV_REMOVE),
		    __KVM_SYSCALL_ERROR("madvise()", -1));
	TEST_ASSERT_EQ(view_pages(v), NR_2M - 4);
	TEST_ASSERT_EQ(READ_ONCE(*(uint64_t *)(v->addr + 8 * SZ_2M)), 0);
	punch(v->fd, 0, BIG_SIZE);
	TEST_ASSERT_EQ(view_pages(v), 0);

	kvm_vm_free(v->vm);
	munmap(mem, BIG_SIZE + SZ_2M);
	close(v->fd);
}

/* What is left of the VM when the process that it belongs to is gone. */
static void check_heritage(struct view *v, uint64_t *mem)
{
	uint64_t nr = 1;
	int ret;

	/* A thread that KVM has in that process may outlive its files by a moment. */
	for (int i = 0; i < 1000 && nr; i++) {
		nr = vm_get_stat(v->vm, "pages_2m") + vm_get_stat(v->vm, "pages_4k");
		usleep(nr ? 10000 : 0);
	}
	TEST_ASSERT(!nr, "KVM still maps %lu pages", nr);
	TEST_ASSERT_EQ(gmem_fdinfo(v->fd, "gmem_2m"), BIG_SIZE);
	for (uint64_t i = 0; i < BIG_SIZE / PAGE_SIZE; i++)
		TEST_ASSERT_EQ(mem[i * PAGE_SIZE / sizeof(*mem)], gmem_tag(i));
	ret = __vcpu_run(v->vcpu);
	TEST_ASSERT(ret == -1 && errno == EIO, "KVM_RUN should fail with EIO, ret %d, errno %d",
		    ret, errno);
	punch(v->fd, 0, BIG_SIZE);
	TEST_ASSERT_EQ(mem[0], 0);
}

static void own_and_die(int done)
{
	struct view view = {}, *v = &view;
	int alive[2];
	char byte;

	v->vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, 1, 1024, gmem_guest_code, &v->vcpu);
	vcpu_args_set(v->vcpu, 1, (uint64_t)0);
	virt_map_level(v->vm, AREA_GPA, AREA_GPA, BIG_SIZE, PG_LEVEL_2M);
	v->fd = vm_create_guest_memfd(v->vm, BIG_SIZE, GMEM_2M);
	v->addr = gmem_mmap(v->fd, BIG_SIZE, 0);
	view_set_slot(v, true);
	guest_touches(v, GMEM_SET);
	TEST_ASSERT(vm_get_stat(v->vm, "pages_2m") >= NR_2M, "Too few pages of 2 MiB");

	TEST_ASSERT(!pipe(alive), __KVM_SYSCALL_ERROR("pipe()", -1));
	if (fork())
		_exit(0);
	close(alive[1]);
	TEST_ASSERT_EQ(read(alive[0], &byte, 1), 0);
	check_heritage(v, v->addr);
	TEST_ASSERT_EQ(write(done, &byte, 1), 1);
	_exit(0);
}

/* The VM's own memory going away is not an event of a mapping: nothing runs any more. */
static void test_owners_exit(void)
{
	int done[2];
	char byte;
	pid_t pid;

	pr_info("A4: the exit of the VM's own process\n");
	TEST_ASSERT(!pipe(done), __KVM_SYSCALL_ERROR("pipe()", -1));
	pid = fork();
	TEST_ASSERT(pid >= 0, __KVM_SYSCALL_ERROR("fork()", pid));
	if (!pid)
		own_and_die(done[1]);
	close(done[1]);
	TEST_ASSERT_EQ(waitpid(pid, NULL, 0), pid);
	TEST_ASSERT(read(done[0], &byte, 1) == 1, "Whoever has inherited the VM has failed");
	close(done[0]);
}

/*
 * A5: KVM's own accesses
 */

static void guest_writes_msr(uint32_t msr, uint64_t value)
{
	uint8_t vector = wrmsr_safe(msr, value);

	__GUEST_ASSERT(!vector, "WRMSR(0x%x) of 0x%lx got vector %u", msr, value, vector);
}

static void guest_kvmclock(void)
{
	guest_writes_msr(MSR_KVM_WALL_CLOCK_NEW, AREA_GPA + SZ_4K);
	guest_writes_msr(MSR_KVM_SYSTEM_TIME_NEW, AREA_GPA + KVM_MSR_ENABLED);
	GUEST_SYNC(0);
	guest_writes_msr(MSR_KVM_SYSTEM_TIME_NEW, AREA2_GPA + KVM_MSR_ENABLED);
	guest_idle();
}

static bool clock_is_set(void *mem)
{
	struct pvclock_vcpu_time_info *time = mem;

	return READ_ONCE(time->version) && !(READ_ONCE(time->version) & 1) &&
	       READ_ONCE(time->tsc_to_system_mul);
}

/* Have KVM write the time, wherever it thinks that it belongs. */
static void update_clock(struct machine *m)
{
	__vcpu_ioctl(m->vcpu, KVM_KVMCLOCK_CTRL, NULL);
	run(m->vcpu);
}

static void test_kvmclock(struct machine *m)
{
	struct pvclock_wall_clock *wall = m->area.mem + SZ_4K;

	run(m->vcpu);
	TEST_ASSERT(wall->version && wall->sec, "No wall clock");
	update_clock(m);
	TEST_ASSERT(clock_is_set(m->area.mem), "No time");

	/* It moves, in a memslot with the same userspace_addr, to the same offset. */
	run(m->vcpu);
	memset(m->area.mem, 0, SZ_4K);
	update_clock(m);
	TEST_ASSERT(clock_is_set(m->area2.mem), "The time has not moved to another gpa");
	TEST_ASSERT(!clock_is_set(m->area.mem), "The time was written to the old gpa");

	/* The page is replaced by a fresh one. */
	punch(m->area2.fd, 0, SZ_4K);
	TEST_ASSERT(!clock_is_set(m->area2.mem), "A hole doesn't read as zeros");
	update_clock(m);
	TEST_ASSERT(clock_is_set(m->area2.mem), "The time was written to a page that's gone");

	/* So is all of the memory. */
	punch(m->area2.fd, 0, AREA_SIZE);
	update_clock(m);
	TEST_ASSERT(clock_is_set(m->area2.mem), "The time was written to a folio that's gone");

	/* Another part of the file gets to the same gpa. */
	vm_set_user_memory_region2(m->vm, AREA2_SLOT, 0, 0, 0, NULL, 0, 0);
	memset(m->area2.mem, 0, SZ_8K);
	vm_set_user_memory_region2(m->vm, AREA2_SLOT, KVM_MEM_GUEST_MEMFD, AREA2_GPA,
				   SZ_64K, m->area2.decoy, m->area2.fd, SZ_4K);
	update_clock(m);
	TEST_ASSERT(!clock_is_set(m->area2.mem), "The time was written to the old offset");
	TEST_ASSERT(clock_is_set(m->area2.mem + SZ_4K), "The time has not moved with the memslot");

	/* No memory at all. */
	vm_set_user_memory_region2(m->vm, AREA2_SLOT, 0, 0, 0, NULL, 0, 0);
	memset(m->area2.mem, 0, SZ_8K);
	update_clock(m);
	TEST_ASSERT(!clock_is_set(m->area2.mem) && !clock_is_set(m->area2.mem + SZ_4K),
		    "The time was written after the memslot was deleted");
}

static uint64_t guest_stop;

static void guest_steal_time(void)
{
	guest_writes_msr(MSR_KVM_STEAL_TIME, AREA_GPA | KVM_MSR_ENABLED);
	GUEST_SYNC(0);
	while (!READ_ONCE(guest_stop))
		cpu_relax();
	guest_idle();
}

static void *run_thread(void *vcpu)
{
	run(vcpu);
	return NULL;
}

/* The time is up to date, and the vCPU was running when it ran last. */
static void assert_steal_time(struct kvm_steal_time *st)
{
	TEST_ASSERT(st->version && !(st->version & 1), "Version of steal time is %u",
		    st->version);
	TEST_ASSERT(!st->preempted, "The vCPU was entered, and is marked preempted");
}

static void test_steal_time(struct machine *m)
{
	struct kvm_steal_time *st = m->area.mem;
	struct timespec start;
	cpu_set_t one, all;
	pthread_t thread;
	bool preempted;

	run(m->vcpu);
	assert_steal_time(st);

	/* Share a CPU with the vCPU to have it preempted. */
	sched_getaffinity(0, sizeof(all), &all);
	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	sched_setaffinity(0, sizeof(one), &one);
	pthread_create(&thread, NULL, run_thread, m->vcpu);

	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		preempted = READ_ONCE(st->preempted) & KVM_VCPU_PREEMPTED;
	} while (!preempted && timespec_elapsed(start).tv_sec < 20);

	guest_stop = 1;
	sync_global_to_guest(m->vm, guest_stop);
	pthread_join(thread, NULL);
	guest_stop = 0;
	sched_setaffinity(0, sizeof(all), &all);

	TEST_ASSERT(preempted, "The vCPU was not marked preempted");
	TEST_ASSERT(st->steal, "No time was stolen");
	run(m->vcpu);
	assert_steal_time(st);

	/* The page is replaced by a fresh one. */
	punch(m->area.fd, 0, SZ_4K);
	TEST_ASSERT_EQ(st->version, 0);
	run(m->vcpu);
	assert_steal_time(st);
}

#define PV_VECTOR	0x80
#define NR_PV_IRQS	5

static uint64_t nr_irqs, nr_irqs_ended_in_memory;

static void guest_pv_eoi_handler(struct ex_regs *regs)
{
	uint64_t *word = (uint64_t *)AREA_GPA;
	bool ended;

	asm volatile("lock btrq $0, %0" : "+m" (*word), "=@ccc" (ended));
	if (ended)
		nr_irqs_ended_in_memory++;
	else
		x2apic_write_reg(APIC_EOI, 0);
	nr_irqs++;
}

static void guest_pv_eoi(void)
{
	guest_writes_msr(MSR_KVM_PV_EOI_EN, AREA_GPA | KVM_MSR_ENABLED);
	x2apic_enable();
	asm volatile("sti");
	for (int i = 0; i < NR_PV_IRQS; i++) {
		x2apic_write_reg(APIC_ICR, APIC_DEST_SELF | APIC_INT_ASSERT |
					   APIC_DM_FIXED | PV_VECTOR);
		while (READ_ONCE(nr_irqs) <= i)
			cpu_relax();
	}
	GUEST_DONE();
}

static void test_pv_eoi(struct machine *m)
{
	vm_install_exception_handler(m->vm, PV_VECTOR, guest_pv_eoi_handler);
	while (!run(m->vcpu))
		;
	sync_global_from_guest(m->vm, nr_irqs_ended_in_memory);

	if ((host_cpu_is_amd && get_kvm_amd_param_bool("avic")) ||
	    (host_cpu_is_intel && get_kvm_intel_param_bool("enable_apicv")))
		return;

	TEST_ASSERT(nr_irqs_ended_in_memory, "No EOI could be signaled in memory");
}

static uint64_t nr_pages_ready;

static void guest_async_pf_handler(struct ex_regs *regs)
{
	struct kvm_vcpu_pv_apf_data *data = (void *)AREA_GPA;

	GUEST_ASSERT_EQ(data->token, 0xffffffff);
	WRITE_ONCE(data->token, 0);
	x2apic_write_reg(APIC_EOI, 0);
	wrmsr(MSR_KVM_ASYNC_PF_ACK, 1);
	nr_pages_ready++;
}

/* If it's enabled, the guest is told to wake up everybody. */
static void guest_async_pf(void)
{
	x2apic_enable();
	asm volatile("sti");
	for (int i = 1; i <= 3; i++) {
		guest_writes_msr(MSR_KVM_ASYNC_PF_INT, PV_VECTOR);
		guest_writes_msr(MSR_KVM_ASYNC_PF_EN, AREA_GPA | KVM_ASYNC_PF_ENABLED |
						      KVM_ASYNC_PF_DELIVERY_AS_INT);
		while (READ_ONCE(nr_pages_ready) < i)
			cpu_relax();
		guest_writes_msr(MSR_KVM_ASYNC_PF_EN, 0);
	}
	GUEST_DONE();
}

static void test_async_pf(struct machine *m)
{
	vm_install_exception_handler(m->vm, PV_VECTOR, guest_async_pf_handler);
	while (!run(m->vcpu))
		;
}

/* Offsets in what Xen calls shared_info and vcpu_info, of 64-bit guests. */
#define XEN_EVTCHN_PENDING	0x800
#define XEN_WC_VERSION		0xc00
#define XEN_VCPU_TIME		32

static void xen_set_attr(struct kvm_vm *vm, uint16_t type, uint64_t value)
{
	struct kvm_xen_hvm_attr attr = { .type = type };

	if (type == KVM_XEN_ATTR_TYPE_LONG_MODE)
		attr.u.long_mode = value;
	else
		attr.u.shared_info.gfn = value;
	vm_ioctl(vm, KVM_XEN_HVM_SET_ATTR, &attr);
}

static void xen_send(struct kvm_vm *vm, uint32_t port)
{
	struct kvm_irq_routing_xen_evtchn event = {
		.port = port,
		.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL,
	};

	vm_ioctl(vm, KVM_XEN_HVM_EVTCHN_SEND, &event);
}

static bool xen_pending(struct machine *m, uint32_t port)
{
	return READ_ONCE(*(uint64_t *)(m->area.mem + XEN_EVTCHN_PENDING)) & BIT(port);
}

static void test_xen(struct machine *m)
{
	struct kvm_xen_hvm_config config = {
		.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND,
		.msr = 0x40000000,
	};
	struct kvm_xen_vcpu_attr info = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
		.u.gpa = AREA_GPA + SZ_4K,
	}, runstate = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
		.u.gpa = AREA_GPA + SZ_8K,
	};

	vm_ioctl(m->vm, KVM_XEN_HVM_CONFIG, &config);
	xen_set_attr(m->vm, KVM_XEN_ATTR_TYPE_LONG_MODE, 1);
	xen_set_attr(m->vm, KVM_XEN_ATTR_TYPE_SHARED_INFO, AREA_GPA / PAGE_SIZE);
	TEST_ASSERT(READ_ONCE(*(uint32_t *)(m->area.mem + XEN_WC_VERSION)),
		    "No wall clock in shared_info");

	vcpu_ioctl(m->vcpu, KVM_XEN_VCPU_SET_ATTR, &info);
	vcpu_ioctl(m->vcpu, KVM_XEN_VCPU_SET_ATTR, &runstate);
	run(m->vcpu);
	TEST_ASSERT(clock_is_set(m->area.mem + SZ_4K + XEN_VCPU_TIME), "No time in vcpu_info");
	TEST_ASSERT(READ_ONCE(*(uint64_t *)(m->area.mem + SZ_8K + 8)), "No runstate");

	xen_send(m->vm, 1);
	TEST_ASSERT(xen_pending(m, 1), "No event in shared_info");

	/* The pages are replaced by fresh ones. */
	punch(m->area.fd, 0, SZ_16K);
	TEST_ASSERT(!xen_pending(m, 1), "A hole doesn't read as zeros");
	run(m->vcpu);
	xen_send(m->vm, 2);
	TEST_ASSERT(xen_pending(m, 2), "The event went to a page that's gone");

	/* It moves to a memslot with the same userspace_addr, to the same offset. */
	memset(m->area.mem, 0, SZ_4K);
	xen_set_attr(m->vm, KVM_XEN_ATTR_TYPE_SHARED_INFO, AREA2_GPA / PAGE_SIZE);
	xen_send(m->vm, 3);
	TEST_ASSERT(!xen_pending(m, 3), "The event went to the old gfn");
	TEST_ASSERT(READ_ONCE(*(uint64_t *)(m->area2.mem + XEN_EVTCHN_PENDING)) & BIT(3),
		    "shared_info has not moved to another gfn");
	xen_set_attr(m->vm, KVM_XEN_ATTR_TYPE_SHARED_INFO, KVM_XEN_INVALID_GFN);
}

static void guest_hyperv(void)
{
	uint64_t *assist = (void *)AREA_GPA + SZ_4K, word = *assist;

	guest_writes_msr(HV_X64_MSR_GUEST_OS_ID, HYPERV_LINUX_OS_ID);
	guest_writes_msr(HV_X64_MSR_HYPERCALL, AREA_GPA | 1);
	guest_writes_msr(HV_X64_MSR_VP_ASSIST_PAGE,
			 (AREA_GPA + SZ_4K) | HV_X64_MSR_VP_ASSIST_PAGE_ENABLE);
	GUEST_ASSERT_EQ(*assist, word & ~0xffffffffULL);
	guest_writes_msr(HV_X64_MSR_REFERENCE_TSC, (AREA_GPA + SZ_8K) | 1);
	guest_idle();
}

static void test_hyperv(struct machine *m)
{
	uint32_t *sequence = m->area.mem + SZ_8K;

	vcpu_set_hv_cpuid(m->vcpu);

	*(uint64_t *)(m->area.mem + SZ_4K) = 0x1234567890abcdef;
	/* It goes up by one, or is zero if the TSC isn't stable. */
	*sequence = 5;

	run(m->vcpu);
	run(m->vcpu);
	TEST_ASSERT(*(uint8_t *)m->area.mem, "No code in the hypercall page");
	TEST_ASSERT(*sequence == 0 || *sequence == 6,
		    "Sequence of the reference TSC page is %u", *sequence);
	TEST_ASSERT(!*sequence || *(uint64_t *)(sequence + 2), "No scale in the TSC page");
}

/* The value that the VMM has for the guest. */
#define MMIO_GPA	0xc0000000ULL
#define MMIO_VALUE	0x5aULL

#define EMULATE_CMPXCHG(type, offset)						\
do {										\
	type *word = (void *)AREA_GPA + (offset), old = 1;			\
	bool equal;								\
										\
	*word = 1;								\
	for (int i = 0; i < 2; i++) {						\
		asm volatile(KVM_FEP "lock cmpxchg %[new], %[word]"		\
			     : [word] "+m" (*word), "+a" (old), "=@ccz" (equal)	\
			     : [new] "q" ((type)2)				\
			     : "memory");					\
		GUEST_ASSERT_EQ(equal, !i);					\
		GUEST_ASSERT_EQ(*word, 2);					\
		GUEST_ASSERT_EQ(old, i + 1);					\
		old = 1;							\
	}									\
} while (0)

static void guest_movsb(void *to, void *from)
{
	asm volatile("movsb" : "+D" (to), "+S" (from) : : "memory");
}

static void guest_emulation(bool forced)
{
	uint64_t *word = (void *)AREA_GPA, val;
	uint8_t *bytes = (void *)AREA_GPA;

	/* Between memory and a device, both ways. */
	guest_movsb(&bytes[100], (void *)MMIO_GPA);
	GUEST_ASSERT_EQ(bytes[100], MMIO_VALUE);
	bytes[101] = MMIO_VALUE + 1;
	guest_movsb((void *)MMIO_GPA, &bytes[101]);

	if (!forced)
		GUEST_DONE();

	asm volatile(KVM_FEP "movq %1, %0" : "=m" (word[0]) : "r" (4711UL));
	GUEST_ASSERT_EQ(word[0], 4711);
	word[1] = 4712;
	asm volatile(KVM_FEP "movq %1, %0" : "=r" (val) : "m" (word[1]));
	GUEST_ASSERT_EQ(val, 4712);

	/* Two pages. */
	word = (void *)AREA_GPA + SZ_4K - 4;
	asm volatile(KVM_FEP "movq %1, %0" : "=m" (*word) : "r" (0x1122334455667788));
	GUEST_ASSERT_EQ(*word, 0x1122334455667788);
	asm volatile(KVM_FEP "movq %1, %0" : "=r" (val) : "m" (*word));
	GUEST_ASSERT_EQ(val, 0x1122334455667788);

	EMULATE_CMPXCHG(uint8_t, 0x203);
	EMULATE_CMPXCHG(uint16_t, 0x206);
	EMULATE_CMPXCHG(uint32_t, 0x20c);
	EMULATE_CMPXCHG(uint64_t, 0x210);
	/* Not aligned, and hence not atomic, but it's done. */
	EMULATE_CMPXCHG(uint64_t, 0x23c);
	EMULATE_CMPXCHG(uint64_t, 0x1ffc);
	GUEST_DONE();
}

static bool force_emulation(void)
{
	const char *path = "/sys/module/kvm/parameters/force_emulation_prefix";
	int fd = open(path, O_WRONLY);
	bool forced;

	if (fd < 0)
		return kvm_is_forced_emulation_enabled();
	forced = write(fd, "1", 1) == 1;
	close(fd);
	return forced;
}

static void test_emulation(struct machine *m)
{
	struct kvm_run *run = m->vcpu->run;
	struct ucall uc;
	bool forced = force_emulation();

	if (!forced)
		pr_info("Emulation cannot be forced, only what accesses devices is emulated\n");
	vcpu_args_set(m->vcpu, 1, (uint64_t)forced);
	virt_map(m->vm, MMIO_GPA, MMIO_GPA, 1);

	vcpu_run(m->vcpu);
	TEST_ASSERT_KVM_EXIT_REASON(m->vcpu, KVM_EXIT_MMIO);
	TEST_ASSERT(!run->mmio.is_write && run->mmio.phys_addr == MMIO_GPA,
		    "Unexpected access of 0x%llx", run->mmio.phys_addr);
	run->mmio.data[0] = MMIO_VALUE;

	vcpu_run(m->vcpu);
	TEST_ASSERT_KVM_EXIT_REASON(m->vcpu, KVM_EXIT_MMIO);
	TEST_ASSERT(run->mmio.is_write && run->mmio.data[0] == MMIO_VALUE + 1,
		    "The device got 0x%x", run->mmio.data[0]);

	vcpu_run(m->vcpu);
	TEST_ASSERT_KVM_EXIT_REASON(m->vcpu, KVM_EXIT_IO);
	if (get_ucall(m->vcpu, &uc) == UCALL_ABORT)
		REPORT_GUEST_ASSERT(uc);
	TEST_ASSERT_EQ(uc.cmd, UCALL_DONE);
}

#define PTE_GVA		(AREA_GPA + 5 * SZ_4K)

static void guest_page_tables(bool forced)
{
	uint64_t *word = (void *)PTE_GVA, val = 1;

	for (int i = 0; i < 2; i++) {
		asm volatile("invlpg (%0)" : : "r" (word) : "memory");
		if (i)
			asm volatile(KVM_FEP "movq %1, %0" : "=r" (val) : "m" (*word));
		else
			val = READ_ONCE(*word);
		GUEST_SYNC(val);
		asm volatile("invlpg (%0)" : : "r" (word) : "memory");
		if (i)
			asm volatile(KVM_FEP "movq %1, %0" : "=m" (*word) : "r" (val));
		else
			WRITE_ONCE(*word, val);
		GUEST_SYNC(val);
		if (!forced)
			break;
	}
	GUEST_DONE();
}

/* The CPU, or KVM in its place, finds the tables, and sets bits in them. */
static void test_page_tables(struct machine *m)
{
	uint64_t *pte = vm_get_page_table_entry(m->vm, PTE_GVA);

	vcpu_args_set(m->vcpu, 1, (uint64_t)force_emulation());
	for (;;) {
		*pte &= ~(PTE_ACCESSED_MASK | PTE_DIRTY_MASK);
		if (run(m->vcpu))
			break;
		TEST_ASSERT((*pte & (PTE_ACCESSED_MASK | PTE_DIRTY_MASK)) == PTE_ACCESSED_MASK,
			    "PTE 0x%lx after reading", *pte);
		run(m->vcpu);
		TEST_ASSERT(*pte & PTE_DIRTY_MASK, "PTE 0x%lx after writing", *pte);
	}
}

/*
 * Nested: all that L1 has for L2, and that KVM uses for it, is in guest_memfd.
 */
#define L2_STACK_WORDS	64

/* On VMX, L1 resumes L2 with its own registers: keep nothing in any of them. */
static void l2_code(void)
{
	for (;;) {
		asm volatile("movabs %0, %%rax\n\t"
			     "lock incq (%%rax)" : : "i" (AREA_GPA) : "rax", "cc", "memory");
		asm volatile("vmcall" : : : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8",
			     "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory");
	}
}

static void l1_svm_code(struct svm_test_data *svm)
{
	static uint64_t stack[L2_STACK_WORDS] __aligned(16);
	uint64_t *word = (uint64_t *)AREA_GPA;

	generic_svm_setup(svm, l2_code, &stack[L2_STACK_WORDS - 1]);
	for (int i = 1; i <= 4; i++) {
		run_guest(svm->vmcb, svm->vmcb_gpa);
		GUEST_ASSERT_EQ(svm->vmcb->control.exit_code, SVM_EXIT_VMMCALL);
		GUEST_ASSERT_EQ(*word, i);
		svm->vmcb->save.rip += 3;
		GUEST_SYNC(i);
	}
	GUEST_DONE();
}

static void l1_vmx_code(struct vmx_pages *vmx)
{
	static uint64_t stack[L2_STACK_WORDS] __aligned(16);
	uint64_t *word = (uint64_t *)AREA_GPA;

	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, l2_code, &stack[L2_STACK_WORDS - 1]);
	for (int i = 1; i <= 4; i++) {
		GUEST_ASSERT(!(i == 1 ? vmlaunch() : vmresume()));
		GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_VMCALL);
		GUEST_ASSERT_EQ(*word, i);
		vmwrite(GUEST_RIP, vmreadz(GUEST_RIP) + 3);
		GUEST_SYNC(i);
	}
	GUEST_DONE();
}

static void test_nested(struct machine *m, bool nested_paging)
{
	struct svm_test_data *svm;
	struct vmx_pages *vmx;
	vm_vaddr_t gva;

	if (kvm_cpu_has(X86_FEATURE_SVM)) {
		svm = vcpu_alloc_svm(m->vm, &gva);
		if (nested_paging) {
			svm_npt_map(svm, m->vm, 0, 0, SZ_1G, PG_LEVEL_2M);
			svm_npt_map(svm, m->vm, AREA_GPA, AREA_GPA, AREA_SIZE, PG_LEVEL_2M);
		}
	} else {
		vmx = vcpu_alloc_vmx(m->vm, &gva);
		if (nested_paging) {
			prepare_eptp(vmx, m->vm, 0);
			__nested_map(vmx, m->vm, 0, 0, SZ_1G, PG_LEVEL_2M);
			__nested_map(vmx, m->vm, AREA_GPA, AREA_GPA, AREA_SIZE, PG_LEVEL_2M);
		}
	}
	vcpu_args_set(m->vcpu, 1, gva);

	while (!run(m->vcpu))
		;
	TEST_ASSERT_EQ(*(uint64_t *)m->area.mem, 4);
}

static void test_nested_shadow(struct machine *m)
{
	test_nested(m, false);
}

static void test_nested_tdp(struct machine *m)
{
	test_nested(m, true);
}

static void guest_l1(void *arg)
{
	if (this_cpu_has(X86_FEATURE_SVM))
		l1_svm_code(arg);
	else
		l1_vmx_code(arg);
}

static bool has_xen(void)
{
	return kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_EVTCHN_SEND;
}

static bool has_hyperv(void)
{
	return kvm_has_cap(KVM_CAP_HYPERV_CPUID) || kvm_has_cap(KVM_CAP_SYS_HYPERV_CPUID);
}

static bool has_nested(void)
{
	return kvm_cpu_has(X86_FEATURE_SVM) || kvm_cpu_has(X86_FEATURE_VMX);
}

static bool has_nested_tdp(void)
{
	if (kvm_cpu_has(X86_FEATURE_SVM))
		return kvm_cpu_has(X86_FEATURE_NPT);

	return kvm_cpu_has(X86_FEATURE_VMX) && kvm_cpu_has_ept();
}

static const struct accessor {
	const char *name;
	void *guest;
	void (*test)(struct machine *m);
	bool (*is_there)(void);
} accessors[] = {
	{ "kvmclock", guest_kvmclock, test_kvmclock },
	{ "steal time", guest_steal_time, test_steal_time },
	{ "PV EOI", guest_pv_eoi, test_pv_eoi },
	{ "async page faults", guest_async_pf, test_async_pf },
	{ "Xen", guest_idle, test_xen, has_xen },
	{ "Hyper-V", guest_hyperv, test_hyperv, has_hyperv },
	{ "emulation", guest_emulation, test_emulation },
	{ "page tables", guest_page_tables, test_page_tables },
	{ "nested, shadow paging", guest_l1, test_nested_shadow, has_nested },
	{ "nested, nested paging", guest_l1, test_nested_tdp, has_nested_tdp },
};

static void test_accessors(void)
{
	struct machine m;

	for (int i = 0; i < ARRAY_SIZE(accessors); i++) {
		const struct accessor *a = &accessors[i];

		if (a->is_there && !a->is_there()) {
			pr_info("A5: %s: not there\n", a->name);
			continue;
		}
		for (int decoy = 0; decoy < 2; decoy++) {
			pr_info("A5: %s, userspace_addr %s\n", a->name,
				decoy ? "of something else" : "0");
			create_machine(&m, a->guest, decoy);
			a->test(&m);
			free_machine(&m);
		}
	}
}

/* A page of private memory is none of KVM's business. */
static void guest_private(void)
{
	uint64_t *words = (uint64_t *)AREA_GPA;

	words[0] = 0x1111;
	words[1] = 0x2222;
	/* It can't be written, and nobody can tell the guest. */
	wrmsr(MSR_KVM_WALL_CLOCK_NEW, AREA_GPA);
	GUEST_ASSERT_EQ(words[0], 0x1111);
	GUEST_ASSERT_EQ(words[1], 0x2222);

	wrmsr_safe(MSR_KVM_SYSTEM_TIME_NEW, AREA_GPA | KVM_MSR_ENABLED);
	GUEST_SYNC(0);
	GUEST_ASSERT_EQ(words[0], 0x1111);
	GUEST_ASSERT_EQ(words[1], 0x2222);
	GUEST_DONE();
}

static void test_private_memory(void)
{
	const struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = KVM_X86_SW_PROTECTED_VM,
	};
	struct machine m = {};

	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM))) {
		pr_info("A5: private memory: not there\n");
		return;
	}

	pr_info("A5: private memory\n");
	m.vm = __vm_create_shape_with_one_vcpu(shape, &m.vcpu, 1024, guest_private);
	add_area(&m, &m.area, AREA_GPA, AREA_SLOT, GUEST_MEMFD_FLAG_MMAP, true);
	vm_mem_set_private(m.vm, AREA_GPA, AREA_SIZE);
	while (!run(m.vcpu))
		;
	kvm_vm_free(m.vm);
	free_area(&m.area);
}

/*
 * What the memslot or the hardware doesn't let KVM have: a page with Hyper-V's
 * hypercalls, and further behind in it the time.
 */
#define WALL_CLOCK	(SZ_1K / 2)
#define CLOCK		SZ_1K
#define STEAL_TIME	SZ_2K
/* Makes versions odd, which none is that KVM has written. */
#define GUARD_BYTE	0x5b

/* Only Hyper-V's MSR tells that KVM could not write. */
static void guest_guarded(bool hyperv)
{
	uint8_t vector = 0;

	if (hyperv)
		guest_writes_msr(HV_X64_MSR_GUEST_OS_ID, HYPERV_LINUX_OS_ID);
	for (;;) {
		wrmsr(MSR_KVM_WALL_CLOCK_NEW, AREA_GPA + WALL_CLOCK);
		wrmsr_safe(MSR_KVM_SYSTEM_TIME_NEW, (AREA_GPA + CLOCK) | KVM_MSR_ENABLED);
		wrmsr_safe(MSR_KVM_STEAL_TIME, (AREA_GPA + STEAL_TIME) | KVM_MSR_ENABLED);
		if (hyperv)
			vector = wrmsr_safe(HV_X64_MSR_HYPERCALL, AREA_GPA | 1);
		GUEST_SYNC(vector);
	}
}

static void create_guarded(struct machine *m)
{
	create_machine(m, guest_guarded, false);
	vcpu_args_set(m->vcpu, 1, (uint64_t)has_hyperv());
	if (has_hyperv())
		vcpu_set_hv_cpuid(m->vcpu);
}

static void let_kvm_write(struct machine *m, bool allowed)
{
	const uint64_t vector = allowed || !has_hyperv() ? 0 : GP_VECTOR;
	struct ucall uc;

	for (int i = 0; i < 3; i++) {
		vcpu_run(m->vcpu);
		TEST_ASSERT_KVM_EXIT_REASON(m->vcpu, KVM_EXIT_IO);
		if (get_ucall(m->vcpu, &uc) == UCALL_ABORT)
			REPORT_GUEST_ASSERT(uc);
		TEST_ASSERT_EQ(uc.cmd, UCALL_SYNC);
		TEST_ASSERT(uc.args[1] == vector,
			    "Writing the hypercall page got vector %lu, expected %lu",
			    uc.args[1], vector);
		update_clock(m);
	}
}

static void assert_written(struct machine *m)
{
	struct kvm_steal_time *st = m->area.mem + STEAL_TIME;
	uint32_t *wall_version = m->area.mem + WALL_CLOCK;

	TEST_ASSERT(!(*wall_version & 1), "KVM has not written the time");
	TEST_ASSERT(clock_is_set(m->area.mem + CLOCK), "KVM has not written the clock");
	TEST_ASSERT(!(st->version & 1), "KVM has not written the steal time");
}

/* A6: KVM writes to a memslot that is read-only as little as the guest does. */
static void test_read_only(void)
{
	struct machine m;

	for (uint32_t flags = 0; flags <= KVM_MEM_READONLY; flags += KVM_MEM_READONLY) {
		pr_info("A6: memslot with flags 0x%x\n", flags);
		create_guarded(&m);
		memset(m.area.mem, GUARD_BYTE, PAGE_SIZE);
		vm_set_user_memory_region2(m.vm, AREA_SLOT, 0, AREA_GPA, 0, NULL, -1, 0);
		vm_set_user_memory_region2(m.vm, AREA_SLOT, KVM_MEM_GUEST_MEMFD | flags,
					   AREA_GPA, AREA_SIZE, NULL, m.area.fd, 0);
		let_kvm_write(&m, !flags);
		if (!flags)
			assert_written(&m);
		for (int i = 0; i < PAGE_SIZE && flags; i++)
			TEST_ASSERT(((uint8_t *)m.area.mem)[i] == GUARD_BYTE,
				    "KVM has written 0x%x to byte %d of a read-only memslot",
				    ((uint8_t *)m.area.mem)[i], i);
		free_machine(&m);
	}
}

/*
 * KVM leaves a page with a memory error alone, also one that it has used before, and
 * uses the one that takes its place.
 */
static void test_memory_error(void)
{
	struct machine m;
	uint8_t *mem;
	int err;

	pr_info("A5: a page with a memory error\n");
	create_guarded(&m);
	mem = m.area.mem;
	memset(mem, GUARD_BYTE, PAGE_SIZE);
	let_kvm_write(&m, true);
	assert_written(&m);

	err = gmem_inject_memory_error(mem);
	if (err == EINVAL || err == EPERM) {
		pr_info("Cannot inject memory errors, %s\n", strerror(err));
		goto out;
	}
	let_kvm_write(&m, false);
	TEST_ASSERT_EQ(gmem_sigbus_code(mem, false), BUS_MCEERR_AR);

	punch(m.area.fd, 0, PAGE_SIZE);
	for (int i = 0; i < PAGE_SIZE; i++)
		TEST_ASSERT(!mem[i], "There's 0x%x in byte %d of a new page", mem[i], i);
	memset(mem, GUARD_BYTE, PAGE_SIZE);
	let_kvm_write(&m, true);
	assert_written(&m);
out:
	free_machine(&m);
}

/*
 * All of it at once: vCPUs run, KVM tells them the time, the VMM unmaps its view
 * and what's at userspace_addr changes, and there are holes.
 */
#define CHAOS_VCPUS	4
#define CHAOS_SIZE	SZ_8M
#define CHAOS_PAGES	(CHAOS_SIZE / PAGE_SIZE)
/* One out of so many pages is used, every other one of them may get a hole. */
#define CHAOS_STEP	61

struct chaos {
	uint64_t stop;
	uint64_t rounds[CHAOS_VCPUS];
	uint64_t bad_page, bad_seen, bad_expected;
};

static struct chaos chaos;

static bool chaos_page_is_kept(uint64_t page)
{
	return page % (2 * CHAOS_STEP) == 0;
}

static void guest_chaos_check(uint64_t page, uint64_t seen, uint64_t expected)
{
	if (seen == expected || chaos.bad_page)
		return;

	chaos.bad_seen = seen;
	chaos.bad_expected = expected;
	WRITE_ONCE(chaos.bad_page, page + 1);
}

static void guest_chaos_round(uint64_t id, uint64_t round)
{
	for (uint64_t page = 0; page < CHAOS_PAGES; page += CHAOS_STEP) {
		uint64_t *word = (uint64_t *)(AREA_GPA + page * PAGE_SIZE) + id, seen;

		seen = READ_ONCE(*word);
		if (chaos_page_is_kept(page)) {
			guest_chaos_check(page, seen, round);
			asm volatile("lock incq %0" : "+m" (*word));
			continue;
		}

		/* Nobody else writes, but it may be zero at any time. */
		if (seen)
			guest_chaos_check(page, seen >> 32, page + 1);
		WRITE_ONCE(*word, ((page + 1) << 32) + round);
	}
}

static void guest_chaos(uint64_t id)
{
	const uint64_t page = AREA_GPA + (2 * id + 1) * CHAOS_STEP * PAGE_SIZE;

	guest_writes_msr(MSR_KVM_SYSTEM_TIME_NEW, (page + 1024) | KVM_MSR_ENABLED);
	guest_writes_msr(MSR_KVM_STEAL_TIME, (page + 2048) | KVM_MSR_ENABLED);

	for (;;) {
		uint64_t round = 0;

		while (!READ_ONCE(chaos.stop))
			guest_chaos_round(id, round++);
		chaos.rounds[id] = round;
		GUEST_SYNC(0);
	}
}

static void chaos_change_view(void *view, int fd, uint32_t random)
{
	void *mem = view;

	switch (random % 6) {
	case 0:
		munmap(view, CHAOS_SIZE);
		break;
	case 1:
	case 2:
		mem = mmap(view, CHAOS_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
			   0);
		break;
	case 3:
		mem = mmap(view, CHAOS_SIZE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		break;
	case 4:
		mprotect(view, CHAOS_SIZE / 2, PROT_READ);
		break;
	case 5:
		madvise(view, CHAOS_SIZE, MADV_DONTNEED);
		break;
	}
	TEST_ASSERT(mem == view, __KVM_SYSCALL_ERROR("mmap()", -1));
}

static void test_chaos(int seconds)
{
	struct guest_random_state random = new_guest_random_state(guest_random_seed);
	uint64_t nr_rounds = 0, nr_holes = 0, sum = 0;
	struct kvm_vcpu *vcpus[CHAOS_VCPUS];
	pthread_t threads[CHAOS_VCPUS];
	struct timespec start, round;
	struct chaos *shared;
	struct kvm_vm *vm;
	void *view, *mem;
	int fd;

	pr_info("A4, A5: everything at once, %d s\n", seconds);

	vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, CHAOS_VCPUS, 1024, guest_chaos, vcpus);
	for (int i = 0; i < CHAOS_VCPUS; i++)
		vcpu_args_set(vcpus[i], 1, (uint64_t)i);
	shared = addr_gva2hva(vm, (vm_vaddr_t)&chaos);

	fd = vm_create_guest_memfd(vm, CHAOS_SIZE, GMEM_2M);
	mem = gmem_mmap(fd, CHAOS_SIZE, 0);
	view = gmem_mmap(fd, CHAOS_SIZE, 0);
	vm_set_user_memory_region2(vm, AREA_SLOT, KVM_MEM_GUEST_MEMFD, AREA_GPA, CHAOS_SIZE,
				   view, fd, 0);
	virt_map_level(vm, AREA_GPA, AREA_GPA, CHAOS_SIZE, PG_LEVEL_2M);

	clock_gettime(CLOCK_MONOTONIC, &start);
	while (timespec_elapsed(start).tv_sec < seconds) {
		WRITE_ONCE(shared->stop, 0);
		for (int i = 0; i < CHAOS_VCPUS; i++)
			pthread_create(&threads[i], NULL, run_thread, vcpus[i]);

		clock_gettime(CLOCK_MONOTONIC, &round);
		do {
			uint32_t nr = 2 * (guest_random_u32(&random) %
					   (CHAOS_PAGES / CHAOS_STEP / 2));
			uint32_t first = (nr + 1) * CHAOS_STEP - guest_random_u32(&random) % 5;
			struct kvm_clock_data clock = { .clock = nr };

			chaos_change_view(view, fd, guest_random_u32(&random));
			/* Up to the page that's kept. */
			punch(fd, (uint64_t)first * PAGE_SIZE,
			      (5 + guest_random_u32(&random) % 20) * PAGE_SIZE);
			nr_holes++;
			/* All vCPUs are told what time it is. */
			if (!(nr_holes % 8))
				vm_ioctl(vm, KVM_SET_CLOCK, &clock);
		} while (timespec_elapsed(round).tv_sec < 2);

		WRITE_ONCE(shared->stop, 1);
		for (int i = 0; i < CHAOS_VCPUS; i++)
			pthread_join(threads[i], NULL);

		TEST_ASSERT(!shared->bad_page, "Guest saw 0x%lx in page %lu, expected 0x%lx",
			    shared->bad_seen, shared->bad_page - 1, shared->bad_expected);
		for (uint64_t page = 0; page < CHAOS_PAGES; page += 2 * CHAOS_STEP) {
			uint64_t *words = mem + page * PAGE_SIZE;

			for (int i = 0; i < CHAOS_VCPUS; i++)
				TEST_ASSERT_EQ(words[i], shared->rounds[i]);
		}
		for (int i = 0; i < CHAOS_VCPUS; i++)
			sum += shared->rounds[i];
		nr_rounds++;
		punch(fd, 0, CHAOS_SIZE);
	}

	pr_info("%lu rounds, %lu holes, the guest went through its pages %lu times\n",
		nr_rounds, nr_holes, sum);
	TEST_ASSERT(sum, "The guest should have gotten to do something");

	kvm_vm_free(vm);
	munmap(mem, CHAOS_SIZE);
	munmap(view, CHAOS_SIZE);
	close(fd);
}

static void help(const char *name)
{
	printf("usage: %s [-h] [-t seconds]\n", name);
	printf(" -t: How long everything happens at once (default 10).\n");
	exit(0);
}

int main(int argc, char *argv[])
{
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

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_GUEST_MEMFD_SLOTS) & KVM_GUEST_MEMFD_SLOTS_NO_HVA);
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_HUGE_2M);
	gmem_stop_numa_balancing();

	/* This goes for all memory that the library adds to VMs. */
	setenv("KVM_SELFTESTS_MEM_SRC", "guest_memfd_2mb", 1);

	test_host_mapping();
	test_owners_exit();
	test_accessors();
	test_private_memory();
	test_read_only();
	test_memory_error();
	test_chaos(seconds);

	return 0;
}
