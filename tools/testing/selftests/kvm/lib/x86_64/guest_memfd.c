// SPDX-License-Identifier: GPL-2.0-only
/*
 * Look at guest_memfd memory from both sides: from the VMM, and from a guest
 * that does what the test tells it to.
 */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <linux/mman.h>
#include <sys/mman.h>

#include "guest_memfd.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"

static struct gmem_work gmem_works[GMEM_MAX_VCPUS];

static bool gmem_do_word(uint64_t op, volatile uint64_t *word, uint64_t val,
			 uint64_t *seen)
{
	switch (op) {
	case GMEM_SET:
		*word = val;
		return true;
	case GMEM_ADD:
		asm volatile("lock addq %1, %0" : "+m" (*word) : "r" (val));
		return true;
	case GMEM_CHECK:
		*seen = *word;
		return *seen == val;
	case GMEM_SET_CHECK:
		*word = val;
		*seen = *word;
		return !*seen || !((*seen ^ val) / GMEM_TAG_STEP);
	}
	return false;
}

/* To be called by the guest, or by the test itself to do the same as the VMM. */
void gmem_do_work(struct gmem_work *work)
{
	uint64_t i, seen = 0;

	for (i = 0; i < work->nr; i++) {
		if (!gmem_do_word(work->op,
				  (void *)(work->gva + i * work->stride),
				  work->val + i * work->step, &seen)) {
			work->bad = seen;
			work->failed = true;
			return;
		}
		work->done++;
	}
}

void gmem_guest_code(uint64_t vcpu_id)
{
	for (;;) {
		gmem_do_work(&gmem_works[vcpu_id]);
		GUEST_SYNC(0);
	}
}

/* The work as seen by the guest, e.g. to find out how far it got. */
struct gmem_work *gmem_vcpu_work(struct kvm_vcpu *vcpu)
{
	TEST_ASSERT(vcpu->id < GMEM_MAX_VCPUS, "Too many vCPUs");
	return addr_gva2hva(vcpu->vm, (vm_vaddr_t)&gmem_works[vcpu->id]);
}

/*
 * Have the vCPU, which must be in gmem_guest_code(), do the work.  Returns what
 * KVM_RUN returned; if that's zero, the reason for the exit tells if the work
 * is done, KVM_EXIT_IO, or not.
 */
int __gmem_vcpu_run(struct kvm_vcpu *vcpu, const struct gmem_work *work)
{
	struct gmem_work *guest_work = gmem_vcpu_work(vcpu);

	*guest_work = *work;
	guest_work->done = 0;
	guest_work->bad = 0;
	guest_work->failed = false;

	return _vcpu_run(vcpu);
}

void gmem_vcpu_run(struct kvm_vcpu *vcpu, const struct gmem_work *work)
{
	struct gmem_work *guest_work = gmem_vcpu_work(vcpu);
	struct ucall uc;
	int r;

	r = __gmem_vcpu_run(vcpu, work);
	TEST_ASSERT(!r, "KVM_RUN failed, %s, exit reason %s, at word %lu of %lu",
		    strerror(errno), exit_reason_str(vcpu->run->exit_reason),
		    guest_work->done, work->nr);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	TEST_ASSERT(guest_work->failed || guest_work->done == work->nr,
		    "Guest has done %lu words of %lu", guest_work->done, work->nr);
	TEST_ASSERT(!guest_work->failed,
		    "Guest sees 0x%lx in word %lu of %lu at 0x%lx, expected 0x%lx",
		    guest_work->bad, guest_work->done, work->nr,
		    work->gva + guest_work->done * work->stride,
		    work->val + guest_work->done * work->step);
}

/*
 * After an exit in the middle of the work, have the vCPU start over with @regs,
 * i.e. those it had when it ran for the first time.
 */
void gmem_vcpu_reset(struct kvm_vcpu *vcpu, struct kvm_regs *regs)
{
	/* Whatever the exit was about must not be completed later. */
	vcpu->run->immediate_exit = 1;
	__vcpu_run(vcpu);
	vcpu->run->immediate_exit = 0;

	vcpu_regs_set(vcpu, regs);
}

/*
 * Have the guest map [gpa, gpa + size) as it is, by pages of @level, with accessed
 * and dirty bits set: the shadow MMU doesn't prefetch what the guest hasn't accessed
 * before.
 */
void gmem_map_in_guest(struct kvm_vm *vm, uint64_t gpa, uint64_t size, int level)
{
	virt_map_level(vm, gpa, gpa, size, level);

	for (uint64_t i = 0; i < size; i += PG_LEVEL_SIZE(level))
		*__vm_get_page_table_entry(vm, gpa + i, &level) |=
			PTE_ACCESSED_MASK | PTE_DIRTY_MASK;
}

void *gmem_mmap(int fd, size_t size, off_t offset)
{
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);

	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	return mem;
}

static __thread sigjmp_buf sigbus_jmp;
static __thread bool sigbus_expected;
static __thread int sigbus_lsb;

static void sigbus_handler(int signal, siginfo_t *info, void *context)
{
	/* Back to the instruction, to die from it. */
	if (!READ_ONCE(sigbus_expected)) {
		sigaction(SIGBUS, &(struct sigaction){ .sa_handler = SIG_DFL }, NULL);
		return;
	}

	sigbus_lsb = info->si_addr_lsb;
	siglongjmp(sigbus_jmp, info->si_code);
}

/* However large the folio is, no more than a page of it is lost. */
static void assert_page_lost(int code)
{
	if (code == BUS_MCEERR_AR || code == BUS_MCEERR_AO)
		TEST_ASSERT(1 << sigbus_lsb == getpagesize(),
			    "SIGBUS says that 2^%d bytes are lost", sigbus_lsb);
}

static void __install_sigbus_handler(void)
{
	struct sigaction action = {
		.sa_sigaction = sigbus_handler,
		.sa_flags = SA_SIGINFO,
	};
	int r = sigaction(SIGBUS, &action, NULL);

	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("sigaction()", r));
}

static void install_sigbus_handler(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, __install_sigbus_handler);
}

/*
 * Access a byte of @mem, without changing it.  Returns the si_code of the
 * SIGBUS, or zero if there was none.
 */
int gmem_sigbus_code(void *mem, bool write)
{
	volatile char *byte = mem;
	int code;

	install_sigbus_handler();

	code = sigsetjmp(sigbus_jmp, 1);
	if (!code) {
		WRITE_ONCE(sigbus_expected, true);
		if (write)
			asm volatile("lock orb $0, %0" : "+m" (*byte));
		else
			(void)*byte;
	}
	WRITE_ONCE(sigbus_expected, false);
	assert_page_lost(code);

	return code;
}

/*
 * Inject a memory error into the page at @mem.  Returns zero or an errno.  The
 * thread that does this may get the SIGBUS right away.
 */
int gmem_inject_memory_error(void *mem)
{
	int code, err = 0;

	install_sigbus_handler();

	code = sigsetjmp(sigbus_jmp, 1);
	if (!code) {
		WRITE_ONCE(sigbus_expected, true);
		err = madvise(mem, getpagesize(), MADV_HWPOISON) ? errno : 0;
	}
	WRITE_ONCE(sigbus_expected, false);
	assert_page_lost(code);

	return err;
}

/* The value of a line of the file's fdinfo. */
uint64_t gmem_fdinfo(int fd, const char *key)
{
	char path[64], line[128];
	uint64_t val = 0;
	bool found = false;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	file = fopen(path, "r");
	TEST_ASSERT(file, __KVM_SYSCALL_ERROR("fopen()", -1));

	while (!found && fgets(line, sizeof(line), file)) {
		char *sep = strstr(line, ":\t");

		if (!sep)
			continue;

		*sep = 0;
		if (!strcmp(line, key)) {
			val = strtoull(sep + 2, NULL, 0);
			found = true;
		}
	}
	fclose(file);

	TEST_ASSERT(found, "No line '%s' in %s", key, path);
	return val;
}

void gmem_pre_fault(struct kvm_vcpu *vcpu, uint64_t gpa, uint64_t size)
{
	struct kvm_pre_fault_memory range = { .gpa = gpa, .size = size };
	int ret;

	do {
		ret = __vcpu_ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &range);
	} while (ret ? errno == EINTR : range.size);
	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_PRE_FAULT_MEMORY, ret));
}

uint64_t gmem_vcpu_stat(struct kvm_vcpu *vcpu, const char *name)
{
	struct kvm_stats_header header;
	struct kvm_stats_desc *descs;
	uint64_t value;
	bool found;
	int fd, i;

	fd = vcpu_get_stats_fd(vcpu);
	read_stats_header(fd, &header);
	descs = read_stats_descriptors(fd, &header);
	for (i = 0, found = false; i < header.num_desc && !found; i++) {
		struct kvm_stats_desc *desc = get_stats_descriptor(descs, i, &header);

		found = !strcmp(desc->name, name);
		if (found)
			read_stat_data(fd, &header, desc, &value, 1);
	}
	TEST_ASSERT(found, "No statistic '%s' of a vCPU", name);
	free(descs);
	close(fd);
	return value;
}

/*
 * Memory of the VM that isn't guest_memfd's is unmapped now and then, for NUMA
 * balancing to see who uses it.  Keep that out of what KVM counts.  Memory of a
 * task with a policy of its own is left alone, and that of a preferred node
 * without a node does as is done by default.
 */
void gmem_stop_numa_balancing(void)
{
	long ret = set_mempolicy(MPOL_PREFERRED, NULL, 0);

	TEST_ASSERT(!ret || errno == ENOSYS, __KVM_SYSCALL_ERROR("set_mempolicy()", ret));
}
