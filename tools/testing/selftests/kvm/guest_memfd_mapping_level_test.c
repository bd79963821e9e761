// SPDX-License-Identifier: GPL-2.0
/*
 * The file is the authority on a memslot's memory if it was created with
 * GUEST_MEMFD_FLAG_MMAP: it alone decides which page backs a gfn and how big
 * the guest's mapping of it is.  Whatever is or isn't mapped at the memslot's
 * userspace_addr has no say in that, neither for pages that the guest faults in
 * nor for those that KVM maps along with them.
 *
 * The test uses the MMU that KVM happens to use.  To cover all of them, run it
 * with TDP MMU, with kvm.tdp_mmu=0, and with kvm_amd.npt=0 or kvm_intel.ept=0.
 * For nested guests with nested paging, KVM shadows L1's page tables anyway.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <linux/falloc.h>
#include <linux/sizes.h>
#include <sys/mman.h>

#include "gfn_probe.h"
#include "guest_memfd.h"
#include "kvm_util.h"
#include "processor.h"
#include "svm_util.h"
#include "test_util.h"
#include "vmx.h"

#define TEST_SLOT	10
/* Congruent with file offset and userspace_addr modulo 2 MiB. */
#define TEST_GPA	(4ULL << 30)
#define TEST_SIZE	(1UL * SZ_2M)
#define TEST_NPAGES	(TEST_SIZE / PAGE_SIZE)
/* Not zero, to tell gfns and offsets. */
#define TEST_OFFSET	(1UL * SZ_2M)
/* Where the guest finds memory if the test wants more than that of it. */
#define WINDOW_SIZE	(4ULL << 30)

/* KVM prefetches within aligned groups of this many pages. */
#define PREFETCH_NPAGES	8

/* What other memory holds, never to be seen by the guest. */
#define OTHER_TAG	0xbadULL

/* What the memslot's userspace_addr points at. */
enum view {
	NO_ADDRESS,
	UNMAPPED,
	PROTECTED,
	SAME_FILE,
	SAME_FILE_READ_ONLY,
	OTHER,
	OTHER_READ_ONLY,
	OTHER_HUGE,
	NR_VIEWS,
};

static const char * const view_names[] = {
	[NO_ADDRESS] = "0",
	[UNMAPPED] = "unmapped",
	[PROTECTED] = "PROT_NONE",
	[SAME_FILE] = "the file",
	[SAME_FILE_READ_ONLY] = "the file, read-only",
	[OTHER] = "other memory",
	[OTHER_READ_ONLY] = "other memory, read-only",
	[OTHER_HUGE] = "other memory, THP",
};

/* Who accesses the memory, and thus which of KVM's MMUs maps it. */
enum guest {
	L1,
	/* L2 with L1's page tables. */
	L2,
	/* L2 with page tables of its own, on top of nested ones. */
	L2_NESTED_PAGING,
	NR_GUESTS,
};

static const char * const guest_names[] = {
	[L1] = "L1",
	[L2] = "L2",
	[L2_NESTED_PAGING] = "L2, nested paging",
};

struct config {
	unsigned long vm_type;
	uint64_t gmem_flags;
	enum view view;
	enum guest guest;
	/* The size of pages in the guest's page tables. */
	int guest_level;
};

struct machine {
	const struct config *config;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	int fd;
	/* What the VMM maps of the file, NULL if it's private. */
	void *mem;
	void *userspace_addr;
};

static struct gfn_probe host_level_probe = { "host_pfn_mapping_level", 2 };
static struct gfn_probe gmem_level_probe = { "kvm_gmem_max_mapping_level", 4 };

static void remove_probes(void)
{
	gfn_probe_remove(&host_level_probe);
	gfn_probe_remove(&gmem_level_probe);
}

static void install_probe(struct gfn_probe *probe)
{
	const uint64_t first_gfn = TEST_GPA / PAGE_SIZE;
	const char *why = gfn_probe_install(probe, first_gfn,
					    first_gfn + WINDOW_SIZE / PAGE_SIZE - 1);

	if (why)
		pr_info("Cannot count calls of %s(): %s\n", probe->function, why);
}

/* L2's code, and L1's to get there. */
static void l2_guest_code(void)
{
	gmem_guest_code(0);
}

#define L2_STACK_WORDS	512

static void l1_svm_code(struct svm_test_data *svm)
{
	static uint64_t stack[L2_STACK_WORDS] __aligned(16);

	/* As if called, i.e. with the stack misaligned by a return address. */
	generic_svm_setup(svm, l2_guest_code, &stack[L2_STACK_WORDS - 1]);
	run_guest(svm->vmcb, svm->vmcb_gpa);
	GUEST_FAIL("L2 exited, code 0x%lx, info 0x%lx 0x%lx",
		   (uint64_t)svm->vmcb->control.exit_code,
		   svm->vmcb->control.exit_info_1, svm->vmcb->control.exit_info_2);
}

static void l1_vmx_code(struct vmx_pages *vmx)
{
	static uint64_t stack[L2_STACK_WORDS] __aligned(16);

	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, l2_guest_code, &stack[L2_STACK_WORDS - 1]);
	GUEST_ASSERT(!vmlaunch());
	GUEST_FAIL("L2 exited, reason 0x%lx", vmreadz(VM_EXIT_REASON));
}

static bool guest_possible(enum guest guest)
{
	if (guest == L1)
		return true;

	if (kvm_cpu_has(X86_FEATURE_SVM))
		return guest == L2 || kvm_cpu_has(X86_FEATURE_NPT);

	return kvm_cpu_has(X86_FEATURE_VMX) && (guest == L2 || kvm_cpu_has_ept());
}

/*
 * With nested paging, L2's physical addresses are L1's.  Slot 0 is below 1 GiB.
 */
static void setup_l2(struct kvm_vcpu *vcpu, bool nested_paging, uint64_t size, int level)
{
	struct kvm_vm *vm = vcpu->vm;
	struct svm_test_data *svm;
	struct vmx_pages *vmx;
	struct kvm_regs regs;
	vm_vaddr_t gva;
	void *code;

	if (kvm_cpu_has(X86_FEATURE_SVM)) {
		svm = vcpu_alloc_svm(vm, &gva);
		code = l1_svm_code;
		if (nested_paging) {
			svm_npt_map(svm, vm, 0, 0, SZ_1G, PG_LEVEL_2M);
			svm_npt_map(svm, vm, TEST_GPA, TEST_GPA, size, level);
		}
	} else {
		vmx = vcpu_alloc_vmx(vm, &gva);
		code = l1_vmx_code;
		if (nested_paging) {
			prepare_eptp(vmx, vm, 0);
			__nested_map(vmx, vm, 0, 0, SZ_1G, PG_LEVEL_2M);
			__nested_map(vmx, vm, TEST_GPA, TEST_GPA, size, level);
		}
	}

	vcpu_regs_get(vcpu, &regs);
	regs.rip = (uint64_t)code;
	vcpu_regs_set(vcpu, &regs);
	vcpu_args_set(vcpu, 1, gva);
}

/*
 * Map the memory in the guest's page tables, with accessed and dirty bits set:
 * the shadow MMU doesn't prefetch what the guest hasn't accessed before.
 */
static void map_in_guest(struct kvm_vm *vm, uint64_t size, int level)
{
	virt_map_level(vm, TEST_GPA, TEST_GPA, size, level);

	for (uint64_t i = 0; i < size; i += PG_LEVEL_SIZE(level))
		*__vm_get_page_table_entry(vm, TEST_GPA + i, &level) |=
			PTE_ACCESSED_MASK | PTE_DIRTY_MASK;
}

static uint64_t other_tag(int page)
{
	return (OTHER_TAG << 48) + page;
}

static void *reserve_aligned(size_t size)
{
	void *mem = mmap(NULL, size + SZ_2M, PROT_NONE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
	return align_ptr_up(mem, SZ_2M);
}

static void *map_other_memory(bool huge)
{
	void *mem = reserve_aligned(TEST_SIZE);
	uint64_t *word;
	int ret;

	mem = mmap(mem, TEST_SIZE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));

	ret = madvise(mem, TEST_SIZE, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	TEST_ASSERT(!ret || errno == EINVAL, __KVM_SYSCALL_ERROR("madvise()", ret));

	for (int i = 0; i < TEST_NPAGES; i++) {
		word = mem + i * PAGE_SIZE;
		*word = other_tag(i);
	}
	return mem;
}

static void *map_view(struct machine *machine)
{
	void *mem;
	int ret;

	switch (machine->config->view) {
	case NO_ADDRESS:
		return NULL;
	case UNMAPPED:
		mem = reserve_aligned(TEST_SIZE);
		munmap(mem, TEST_SIZE);
		return mem;
	case PROTECTED:
		return reserve_aligned(TEST_SIZE);
	case SAME_FILE:
	case SAME_FILE_READ_ONLY:
		mem = mmap(reserve_aligned(TEST_SIZE), TEST_SIZE,
			   PROT_READ | (machine->config->view == SAME_FILE ? PROT_WRITE : 0),
			   MAP_SHARED | MAP_FIXED, machine->fd, TEST_OFFSET);
		TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));
		return mem;
	case OTHER:
	case OTHER_HUGE:
		return map_other_memory(machine->config->view == OTHER_HUGE);
	case OTHER_READ_ONLY:
		mem = map_other_memory(false);
		ret = mprotect(mem, TEST_SIZE, PROT_READ);
		TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("mprotect()", ret));
		return mem;
	default:
		TEST_FAIL("No such view %d", machine->config->view);
	}
}

static void assert_other_memory_untouched(struct machine *machine)
{
	uint64_t *word;

	switch (machine->config->view) {
	case OTHER:
	case OTHER_READ_ONLY:
	case OTHER_HUGE:
		break;
	default:
		return;
	}

	for (int i = 0; i < TEST_NPAGES; i++) {
		word = machine->userspace_addr + i * PAGE_SIZE;
		TEST_ASSERT(*word == other_tag(i),
			    "Page %d of the memory at userspace_addr was written to, 0x%lx is now 0x%lx",
			    i, other_tag(i), *word);
	}
}

static void create_machine(struct machine *machine, const struct config *config)
{
	struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = config->vm_type,
	};
	struct kvm_vm *vm;

	machine->config = config;
	vm = __vm_create_shape_with_one_vcpu(shape, &machine->vcpu, 2 * TEST_NPAGES,
					     gmem_guest_code);
	machine->vm = vm;
	vcpu_args_set(machine->vcpu, 1, 0ul);

	machine->fd = vm_create_guest_memfd(vm, TEST_OFFSET + TEST_SIZE, config->gmem_flags);
	machine->mem = NULL;
	if (config->gmem_flags & GUEST_MEMFD_FLAG_INIT_SHARED)
		machine->mem = gmem_mmap(machine->fd, TEST_SIZE, TEST_OFFSET);

	machine->userspace_addr = map_view(machine);
	vm_set_user_memory_region2(vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD, TEST_GPA,
				   TEST_SIZE, machine->userspace_addr,
				   machine->fd, TEST_OFFSET);
	if (!machine->mem)
		vm_mem_set_private(vm, TEST_GPA, TEST_SIZE / 2);

	map_in_guest(vm, TEST_SIZE, config->guest_level);
	if (config->guest != L1)
		setup_l2(machine->vcpu, config->guest == L2_NESTED_PAGING,
			 TEST_SIZE, config->guest_level);

	/* Have the guest map all it needs to work. */
	gmem_vcpu_run(machine->vcpu, &(struct gmem_work){ .nr = 0 });
	gmem_vcpu_run(machine->vcpu, &(struct gmem_work){ .nr = 0 });
}

static void free_machine(struct machine *machine)
{
	assert_other_memory_untouched(machine);

	kvm_vm_free(machine->vm);
	if (machine->mem)
		munmap(machine->mem, TEST_SIZE);
	if (machine->config->view != NO_ADDRESS && machine->config->view != UNMAPPED)
		munmap(machine->userspace_addr, TEST_SIZE);
	close(machine->fd);
}

static void guest_does(struct machine *machine, enum gmem_op op, int first_page,
		       int nr, int stride, uint64_t val, uint64_t step)
{
	struct gmem_work work = {
		.op = op,
		.gva = TEST_GPA + first_page * PAGE_SIZE,
		.nr = nr,
		.stride = stride * PAGE_SIZE,
		.val = val,
		.step = step,
	};

	gmem_vcpu_run(machine->vcpu, &work);
}

static void guest_checks(struct machine *machine, uint64_t val)
{
	guest_does(machine, GMEM_CHECK, 0, TEST_NPAGES, 1, val, val ? GMEM_TAG_STEP : 0);
}

static void vmm_fills(struct machine *machine)
{
	uint64_t *word;

	for (int i = 0; i < TEST_NPAGES; i++) {
		word = machine->mem + i * PAGE_SIZE;
		*word = gmem_tag(i);
	}
}

static void vmm_checks(struct machine *machine, uint64_t val, uint64_t step)
{
	uint64_t *word;

	if (!machine->mem)
		return;

	for (int i = 0; i < TEST_NPAGES; i++) {
		word = machine->mem + i * PAGE_SIZE;
		TEST_ASSERT(*word == val + i * step,
			    "Page %d of the file holds 0x%lx, expected 0x%lx",
			    i, *word, val + i * step);
	}
}

/* How many SPTEs of each size map the file? */
struct sptes {
	uint64_t nr_4k;
	uint64_t nr_2m;
	uint64_t nr_1g;
};

static struct sptes count_all_sptes(struct kvm_vm *vm)
{
	return (struct sptes) {
		.nr_4k = vm_get_stat(vm, "pages_4k"),
		.nr_2m = vm_get_stat(vm, "pages_2m"),
		.nr_1g = vm_get_stat(vm, "pages_1g"),
	};
}

/*
 * Count what a hole as big as the file zaps, which gives the same answer no
 * matter what happens to slot 0.  The file is empty afterwards.
 */
static struct sptes punch_and_count(struct machine *machine)
{
	struct sptes sptes = count_all_sptes(machine->vm), left;
	int ret = fallocate(machine->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
			    0, TEST_OFFSET + TEST_SIZE);

	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("fallocate()", ret));
	left = count_all_sptes(machine->vm);
	sptes.nr_4k -= left.nr_4k;
	sptes.nr_2m -= left.nr_2m;
	sptes.nr_1g -= left.nr_1g;
	return sptes;
}

static void assert_sptes(struct machine *machine, uint64_t min_4k, uint64_t max_4k)
{
	struct sptes sptes = punch_and_count(machine);

	TEST_ASSERT(sptes.nr_4k >= min_4k && sptes.nr_4k <= max_4k &&
		    !sptes.nr_2m && !sptes.nr_1g,
		    "SPTEs: %lu of 4K, %lu of 2M, %lu of 1G, expected %lu to %lu of 4K",
		    sptes.nr_4k, sptes.nr_2m, sptes.nr_1g, min_4k, max_4k);
}

static void assert_host_not_asked(void)
{
	uint64_t nr;

	if (!host_level_probe.installed)
		return;

	nr = gfn_probe_read(&host_level_probe);
	TEST_ASSERT(!nr, "host_pfn_mapping_level() was called %lu times", nr);
}

/*
 * The probe counts: KVM does ask the primary MMU how big a mapping of memory
 * can be that userspace has mapped.
 */
static void test_host_asked_for_anonymous_memory(void)
{
	struct config config = { .guest_level = PG_LEVEL_2M };
	struct machine machine = { .config = &config };
	void *mem;

	if (!host_level_probe.installed)
		return;

	machine.vm = __vm_create_shape_with_one_vcpu(VM_SHAPE_DEFAULT, &machine.vcpu,
						     2 * TEST_NPAGES, gmem_guest_code);
	vcpu_args_set(machine.vcpu, 1, 0ul);
	mem = map_other_memory(false);
	vm_set_user_memory_region(machine.vm, TEST_SLOT, 0, TEST_GPA, TEST_SIZE, mem);
	map_in_guest(machine.vm, TEST_SIZE, config.guest_level);

	gfn_probe_read(&host_level_probe);
	guest_does(&machine, GMEM_ADD, 0, TEST_NPAGES, 1, 1, 0);
	TEST_ASSERT(gfn_probe_read(&host_level_probe),
		    "host_pfn_mapping_level() should have been called");

	kvm_vm_free(machine.vm);
	munmap(mem, TEST_SIZE);
}

/* The guest is the first to touch the memory. */
static void test_faulted_by_guest(struct machine *machine)
{
	guest_does(machine, GMEM_CHECK, 0, TEST_NPAGES, 1, 0, 0);
	guest_does(machine, GMEM_ADD, 0, TEST_NPAGES, 1, gmem_tag(0), GMEM_TAG_STEP);
	guest_checks(machine, gmem_tag(0));
	vmm_checks(machine, gmem_tag(0), GMEM_TAG_STEP);
	TEST_ASSERT_EQ(gmem_fdinfo(machine->fd, "gmem_4k"), TEST_SIZE);
	assert_host_not_asked();
	assert_other_memory_untouched(machine);
	assert_sptes(machine, TEST_NPAGES, TEST_NPAGES);

	/* The holes are the guest's, too. */
	guest_checks(machine, 0);
}

/*
 * The VMM was there first, i.e. whatever KVM prefetches is found, in the file
 * or at the wrong place.  The guest increments every page.
 */
static void test_filled_by_vmm(struct machine *machine)
{
	vmm_fills(machine);

	guest_does(machine, GMEM_ADD, 0, TEST_NPAGES, 1, 1, 0);
	assert_other_memory_untouched(machine);
	vmm_checks(machine, gmem_tag(0) + 1, GMEM_TAG_STEP);
	guest_checks(machine, gmem_tag(0) + 1);
	assert_host_not_asked();
	assert_sptes(machine, TEST_NPAGES, TEST_NPAGES);
}

/*
 * Have the guest touch one page of each group, and look at the others without
 * a fault if KVM has prefetched them.  Whether it does is up to the MMU.
 */
static void test_prefetched(struct machine *machine)
{
	const int nr_groups = TEST_NPAGES / PREFETCH_NPAGES;

	/* The first of each group, and one in the middle. */
	for (int i = 0; i < PREFETCH_NPAGES; i += 5) {
		vmm_fills(machine);
		guest_does(machine, GMEM_ADD, i, nr_groups, PREFETCH_NPAGES, 0, 0);
		guest_checks(machine, gmem_tag(0));
		assert_sptes(machine, TEST_NPAGES, TEST_NPAGES);

		vmm_fills(machine);
		guest_does(machine, GMEM_ADD, i, nr_groups, PREFETCH_NPAGES, 1, 0);
		assert_other_memory_untouched(machine);
		assert_sptes(machine, nr_groups, TEST_NPAGES);
	}

	assert_host_not_asked();
}

/* Nobody asked for the neighbours of a page, so they are not allocated. */
static void test_prefetch_does_not_allocate(struct machine *machine)
{
	const int nr_groups = TEST_NPAGES / PREFETCH_NPAGES;
	uint64_t *word;

	/* Pages 3 and 4 of each group are there, and the guest touches 5. */
	for (int i = 0; i < nr_groups; i++) {
		for (int j = 3; j <= 4; j++) {
			word = machine->mem + (i * PREFETCH_NPAGES + j) * PAGE_SIZE;
			*word = gmem_tag(i * PREFETCH_NPAGES + j);
		}
	}
	TEST_ASSERT_EQ(gmem_fdinfo(machine->fd, "gmem_4k"), 2 * nr_groups * PAGE_SIZE);

	guest_does(machine, GMEM_ADD, 5, nr_groups, PREFETCH_NPAGES,
		   gmem_tag(5), PREFETCH_NPAGES * GMEM_TAG_STEP);
	TEST_ASSERT_EQ(gmem_fdinfo(machine->fd, "gmem_4k"), 3 * nr_groups * PAGE_SIZE);
	assert_other_memory_untouched(machine);

	for (int j = 3; j <= 5; j++)
		guest_does(machine, GMEM_CHECK, j, nr_groups, PREFETCH_NPAGES,
			   gmem_tag(j), PREFETCH_NPAGES * GMEM_TAG_STEP);
	guest_does(machine, GMEM_CHECK, 6, nr_groups, PREFETCH_NPAGES, 0, 0);
	assert_host_not_asked();
	assert_sptes(machine, 4 * nr_groups, 4 * nr_groups);
}

/* KVM_PRE_FAULT_MEMORY maps what the file has, too. */
static void test_pre_faulted(struct machine *machine)
{
	struct kvm_pre_fault_memory range = {
		.gpa = TEST_GPA,
		.size = TEST_SIZE,
	};
	struct sptes before, after;
	int ret;

	if (!kvm_check_cap(KVM_CAP_PRE_FAULT_MEMORY))
		return;

	vmm_fills(machine);

	before = count_all_sptes(machine->vm);
	do {
		ret = __vcpu_ioctl(machine->vcpu, KVM_PRE_FAULT_MEMORY, &range);
	} while (range.size && (!ret || errno == EINTR));
	TEST_ASSERT(!ret && !range.size, KVM_IOCTL_ERROR(KVM_PRE_FAULT_MEMORY, ret));
	after = count_all_sptes(machine->vm);
	TEST_ASSERT_EQ(after.nr_4k - before.nr_4k, TEST_NPAGES);

	guest_checks(machine, gmem_tag(0));
	guest_does(machine, GMEM_ADD, 0, TEST_NPAGES, 1, 1, 0);
	vmm_checks(machine, gmem_tag(0) + 1, GMEM_TAG_STEP);
	assert_host_not_asked();
	assert_sptes(machine, TEST_NPAGES, TEST_NPAGES);
}

/*
 * If the memslot allows huge pages, it's the file that KVM asks, and the file
 * has small ones.
 */
static void test_file_asked(struct machine *machine)
{
	if (!gmem_level_probe.installed)
		return;

	gfn_probe_read(&gmem_level_probe);
	guest_does(machine, GMEM_ADD, 0, TEST_NPAGES, 1, 1, 0);
	TEST_ASSERT(gfn_probe_read(&gmem_level_probe),
		    "kvm_gmem_max_mapping_level() should have been called");
	assert_host_not_asked();
	assert_sptes(machine, TEST_NPAGES, TEST_NPAGES);
}

/* Every test begins and ends with the file being empty. */
static void test_all(const struct config *config)
{
	struct machine machine;

	pr_info("%s, guest pages of %s, userspace_addr: %s\n",
		guest_names[config->guest],
		config->guest_level == PG_LEVEL_4K ? "4K" : "2M",
		view_names[config->view]);

	create_machine(&machine, config);

	test_faulted_by_guest(&machine);
	test_filled_by_vmm(&machine);
	if (config->guest == L1)
		test_pre_faulted(&machine);

	/*
	 * A shadow MMU prefetches what the guest maps with small pages, and has
	 * no reason to think of big ones.
	 */
	if (config->guest_level == PG_LEVEL_4K) {
		test_prefetched(&machine);
		test_prefetch_does_not_allocate(&machine);
	} else {
		test_file_asked(&machine);
	}

	free_machine(&machine);
}

/* Memory that is private to the guest, or shared but not with the VMM. */
static void test_sw_protected_vm(enum view view)
{
	struct config config = {
		.vm_type = KVM_X86_SW_PROTECTED_VM,
		.gmem_flags = GUEST_MEMFD_FLAG_MMAP,
		.view = view,
		.guest_level = PG_LEVEL_2M,
	};
	struct machine machine;

	pr_info("SW-protected VM, userspace_addr: %s\n", view_names[view]);

	create_machine(&machine, &config);
	test_faulted_by_guest(&machine);
	free_machine(&machine);
}

int main(int argc, char *argv[])
{
	struct config config = {
		.gmem_flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
	};

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD_FLAGS));
	TEST_REQUIRE(!(config.gmem_flags & ~kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS)));

	atexit(remove_probes);
	install_probe(&host_level_probe);
	install_probe(&gmem_level_probe);

	test_host_asked_for_anonymous_memory();

	for (config.guest = 0; config.guest < NR_GUESTS; config.guest++) {
		if (!guest_possible(config.guest)) {
			pr_info("%s: not possible\n", guest_names[config.guest]);
			continue;
		}

		for (config.guest_level = PG_LEVEL_4K; config.guest_level <= PG_LEVEL_2M;
		     config.guest_level++) {
			for (config.view = 0; config.view < NR_VIEWS; config.view++)
				test_all(&config);
		}
	}

	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM))) {
		pr_info("SW-protected VM: not possible\n");
		return 0;
	}
	for (config.view = 0; config.view < NR_VIEWS; config.view++)
		test_sw_protected_vm(config.view);

	return 0;
}
