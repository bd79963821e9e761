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

#define GMEM_SHARED	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)

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

static void set_slot(struct machine *machine, uint64_t size)
{
	vm_set_user_memory_region2(machine->vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD, TEST_GPA,
				   size, machine->userspace_addr, machine->fd, TEST_OFFSET);
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
	set_slot(machine, TEST_SIZE);
	if (!machine->mem)
		vm_mem_set_private(vm, TEST_GPA, TEST_SIZE / 2);

	gmem_map_in_guest(vm, TEST_GPA, TEST_SIZE, config->guest_level);
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

static struct sptes sub_sptes(struct sptes sptes, struct sptes others)
{
	sptes.nr_4k -= others.nr_4k;
	sptes.nr_2m -= others.nr_2m;
	sptes.nr_1g -= others.nr_1g;
	return sptes;
}

/*
 * Count what a hole as big as the file zaps, which gives the same answer no
 * matter what happens to slot 0.  The file is empty afterwards.
 */
static struct sptes punch_and_count(struct machine *machine)
{
	struct sptes sptes = count_all_sptes(machine->vm);
	int ret = fallocate(machine->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
			    0, TEST_OFFSET + TEST_SIZE);

	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("fallocate()", ret));
	return sub_sptes(sptes, count_all_sptes(machine->vm));
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
	gmem_map_in_guest(machine.vm, TEST_GPA, TEST_SIZE, config.guest_level);

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
	struct sptes before, after;

	if (!kvm_check_cap(KVM_CAP_PRE_FAULT_MEMORY))
		return;

	vmm_fills(machine);

	/* Have all SPTEs zapped, which must not matter to what isn't zapped yet. */
	set_slot(machine, 0);
	set_slot(machine, TEST_SIZE);

	before = count_all_sptes(machine->vm);
	gmem_pre_fault(machine->vcpu, TEST_GPA, TEST_SIZE);
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

/*
 * Huge pages
 *
 * A guest can map the file as big as the file's folios are, as far as gfns and
 * file offsets are congruent and the memslot covers the whole block.  That is
 * all, userspace_addr makes no difference, and neither does who was the first to
 * touch the memory.
 */

#define GMEM_HUGE	(GUEST_MEMFD_FLAG_HUGE_2M | GUEST_MEMFD_FLAG_HUGE_1G)

static const uint64_t level_npages[] = {
	[PG_LEVEL_4K] = 1,
	[PG_LEVEL_2M] = SZ_2M / PAGE_SIZE,
	[PG_LEVEL_1G] = SZ_1G / PAGE_SIZE,
};

enum huge_view {
	HUGE_NO_ADDRESS,
	/* The file, with address and gfn congruent modulo 1 GiB. */
	HUGE_CONGRUENT,
	HUGE_4K_OFF,
	HUGE_SMALL_PAGES,
	HUGE_OTHER,
	NR_HUGE_VIEWS,
};

static const char * const huge_view_names[] = { "0", "congruent", "4K off", "4K pages", "other" };

/* Where the file is in guest memory, i.e. what gfn and offset differ by. */
enum congruence { MOD_1G, MOD_2M, MOD_4K, NR_CONGRUENCES };

static const char * const congruence_names[] = { "1G", "2M", "4K" };
static const uint64_t congruence_delta[] = { 0, 3 * SZ_2M, 3 * PAGE_SIZE };

enum shape { COVERS, CUTS_START, CUTS_END, TWO_SLOTS, NR_SHAPES };

static const char * const shape_names[] = { "covers", "cuts start", "cuts end", "two slots" };

enum toucher {
	BY_GUEST,
	BY_VMM,
	BY_FALLOCATE,
	BY_PRE_FAULT,
	NR_TOUCHERS,
	/* All but what earlier cases have left out is there. */
	BY_EARLIER_CASE = NR_TOUCHERS,
};

static const char * const toucher_names[] = {
	"guest", "VMM", "fallocate", "pre-fault", "earlier case",
};

struct huge_case {
	enum huge_view view;
	enum congruence congruence;
	enum shape shape;
	enum toucher toucher;
};

/* Pages of the file. */
struct range {
	uint64_t first;
	uint64_t nr;
};

#define MAX_RANGES	128

struct huge_machine {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	uint64_t flags;
	enum guest guest;
	int fd;
	uint64_t npages;
	/* The VMM's own mapping. */
	void *mem;
	/* What the file should hold, by page, 0 for holes. */
	uint8_t *level;
	/* Makes a difference between what's written in each case. */
	uint64_t serial;

	struct range slots[2];
	int nr_slots;
	/* What is touched, each range in one go. */
	struct range ranges[MAX_RANGES];
	int nr_ranges;
};

static int guest_max_level(void)
{
	return kvm_cpu_has(X86_FEATURE_GBPAGES) ? PG_LEVEL_1G : PG_LEVEL_2M;
}

static void create_huge_machine(struct huge_machine *m, uint64_t flags, uint64_t npages,
				enum guest guest)
{
	const int level = guest_max_level();

	memset(m, 0, sizeof(*m));
	m->flags = flags;
	m->guest = guest;
	m->npages = npages;
	m->vm = __vm_create_shape_with_one_vcpu(VM_SHAPE_DEFAULT, &m->vcpu, 4 * TEST_NPAGES,
						gmem_guest_code);
	vcpu_args_set(m->vcpu, 1, 0ul);

	/* Deleting a memslot is to zap that memslot's SPTEs only. */
	vm_enable_cap(m->vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);
	/*
	 * If not told how many shadow pages it may have, KVM goes by the size of
	 * all memslots, and zaps what's too much when that shrinks.
	 */
	vm_ioctl(m->vm, KVM_SET_NR_MMU_PAGES, (void *)4096ul);

	gmem_map_in_guest(m->vm, TEST_GPA, WINDOW_SIZE, level);
	if (guest != L1)
		setup_l2(m->vcpu, guest == L2_NESTED_PAGING, WINDOW_SIZE, level);

	m->fd = vm_create_guest_memfd(m->vm, npages * PAGE_SIZE, flags);
	m->mem = gmem_mmap(m->fd, npages * PAGE_SIZE, 0);
	m->level = calloc(npages, sizeof(*m->level));
	TEST_ASSERT(m->level, "No memory for %lu pages", npages);
}

static void free_huge_machine(struct huge_machine *m)
{
	kvm_vm_free(m->vm);
	munmap(m->mem, m->npages * PAGE_SIZE);
	close(m->fd);
	free(m->level);
}

/*
 * The rule for folios: the biggest permitted size whose naturally aligned block
 * is inside of the file and empty.
 */
static bool folio_fits(struct huge_machine *m, uint64_t page, int level)
{
	const uint64_t nr = level_npages[level], first = align_down(page, nr);

	if (level == PG_LEVEL_1G && !(m->flags & GUEST_MEMFD_FLAG_HUGE_1G))
		return false;
	if (level == PG_LEVEL_2M && !(m->flags & GUEST_MEMFD_FLAG_HUGE_2M))
		return false;
	if (first + nr > m->npages)
		return false;

	for (uint64_t i = first; i < first + nr; i++) {
		if (m->level[i])
			return false;
	}
	return true;
}

static void model_touch(struct huge_machine *m)
{
	for (int i = 0; i < m->nr_ranges; i++) {
		for (uint64_t page = m->ranges[i].first;
		     page < m->ranges[i].first + m->ranges[i].nr; page++) {
			int level = PG_LEVEL_1G;

			if (m->level[page])
				continue;

			while (!folio_fits(m, page, level))
				level--;
			memset(&m->level[align_down(page, level_npages[level])], level,
			       level_npages[level]);
		}
	}
}

/* Does the file hold what it should?  Only 1 GiB may fail, there's but so much. */
static bool check_folios(struct huge_machine *m)
{
	uint64_t bytes[PG_LEVEL_NUM] = {}, got_1g = gmem_fdinfo(m->fd, "gmem_1g");

	for (uint64_t i = 0; i < m->npages; i++)
		bytes[m->level[i]] += PAGE_SIZE;

	if (got_1g < bytes[PG_LEVEL_1G])
		return false;

	TEST_ASSERT_EQ(got_1g, bytes[PG_LEVEL_1G]);
	TEST_ASSERT_EQ(gmem_fdinfo(m->fd, "gmem_2m"), bytes[PG_LEVEL_2M]);
	TEST_ASSERT_EQ(gmem_fdinfo(m->fd, "gmem_4k"), bytes[PG_LEVEL_4K]);
	return true;
}

/*
 * The rule for mappings: as big as the folio, as far as the naturally aligned
 * block around the gfn is aligned in the file, too, and inside of the memslot.
 */
static int mapping_level(struct huge_machine *m, const struct range *slot,
			 uint64_t delta, uint64_t page)
{
	int level;

	for (level = m->level[page]; level > PG_LEVEL_4K; level--) {
		const uint64_t nr = level_npages[level];

		if (delta / PAGE_SIZE % nr)
			continue;
		if (align_down(page, nr) >= slot->first &&
		    align_down(page, nr) + nr <= slot->first + slot->nr)
			break;
	}
	return level;
}

static struct sptes expected_sptes(struct huge_machine *m, uint64_t delta)
{
	uint64_t nr[PG_LEVEL_NUM] = {}, last[PG_LEVEL_NUM];

	memset(last, 0xff, sizeof(last));
	for (int i = 0; i < m->nr_ranges; i++) {
		for (uint64_t page = m->ranges[i].first;
		     page < m->ranges[i].first + m->ranges[i].nr; page++) {
			const struct range *slot = &m->slots[0];
			int level;

			if (page >= slot->first + slot->nr)
				slot++;
			level = mapping_level(m, slot, delta, page);
			if (page / level_npages[level] != last[level])
				nr[level]++;
			last[level] = page / level_npages[level];
		}
	}

	return (struct sptes) {
		.nr_4k = nr[PG_LEVEL_4K],
		.nr_2m = nr[PG_LEVEL_2M],
		.nr_1g = nr[PG_LEVEL_1G],
	};
}

static void shape_slots(struct huge_machine *m, enum shape shape)
{
	/* Somewhere in the middle of a folio. */
	const uint64_t cut = align_down(m->npages / 2, level_npages[PG_LEVEL_2M]) + 20;

	m->nr_slots = 1;
	switch (shape) {
	case COVERS:
		m->slots[0] = (struct range){ 0, m->npages };
		break;
	case CUTS_START:
		m->slots[0] = (struct range){ 5, m->npages - 5 };
		break;
	case CUTS_END:
		/* The last pages, which are no more than a tail, and 5 more. */
		m->slots[0] = (struct range){ 0, align_down(m->npages, TEST_NPAGES) - 5 };
		break;
	default:
		m->slots[0] = (struct range){ 0, cut };
		m->slots[1] = (struct range){ cut, m->npages - cut };
		m->nr_slots = 2;
		break;
	}
}

static void add_range(struct huge_machine *m, uint64_t first, uint64_t end)
{
	struct range *last = &m->ranges[m->nr_ranges - 1];

	if (m->nr_ranges && first < last->first + last->nr)
		first = last->first + last->nr;
	if (first >= end)
		return;

	TEST_ASSERT(m->nr_ranges < MAX_RANGES, "Too many ranges");
	m->ranges[m->nr_ranges++] = (struct range){ first, end - first };
}

/*
 * Touch all of a small file, and samples of a big one, in whole groups of what
 * may be prefetched together.  Groups are aligned in guest memory.
 */
static void choose_ranges(struct huge_machine *m, uint64_t delta)
{
	const uint64_t nr = PREFETCH_NPAGES, shift = delta / PAGE_SIZE % nr;

	m->nr_ranges = 0;
	for (int i = 0; i < m->nr_slots; i++) {
		const uint64_t first = m->slots[i].first, end = first + m->slots[i].nr;
		uint64_t step = max(align_down(m->slots[i].nr / 40, nr), nr);
		uint64_t page, group;

		if (m->npages <= 8 * TEST_NPAGES) {
			add_range(m, first, end);
			continue;
		}

		for (page = first; page < end; page += step) {
			group = align_down(page + shift, nr);
			add_range(m, group > first + shift ? group - shift : first,
				  min(group + nr - shift, end));
		}
		group = align_down(end - 1 + shift, nr);
		add_range(m, max(group - shift, first), end);
	}
}

static void guest_does_huge(struct huge_machine *m, uint64_t delta, enum gmem_op op,
			    uint64_t val, uint64_t step)
{
	for (int i = 0; i < m->nr_ranges; i++) {
		const struct range *range = &m->ranges[i];
		struct gmem_work work = {
			.op = op,
			.gva = TEST_GPA + delta + range->first * PAGE_SIZE,
			.nr = range->nr,
			.stride = PAGE_SIZE,
			.val = val + range->first * step,
			.step = step,
		};

		gmem_vcpu_run(m->vcpu, &work);
	}
}

static void vmm_does_huge(struct huge_machine *m, void *mem, enum gmem_op op,
			  uint64_t val, uint64_t step)
{
	for (int i = 0; i < m->nr_ranges; i++) {
		const struct range *range = &m->ranges[i];
		struct gmem_work work = {
			.op = op,
			.gva = (uint64_t)mem + range->first * PAGE_SIZE,
			.nr = range->nr,
			.stride = PAGE_SIZE,
			.val = val + range->first * step,
			.step = step,
		};

		gmem_do_work(&work);
		TEST_ASSERT(!work.failed, "VMM sees 0x%lx in page %lu, expected 0x%lx",
			    work.bad, range->first + work.done,
			    work.val + work.done * step);
	}
}

static void pre_fault_huge(struct huge_machine *m, uint64_t delta)
{
	for (int i = 0; i < m->nr_ranges; i++) {
		gmem_pre_fault(m->vcpu, TEST_GPA + delta + m->ranges[i].first * PAGE_SIZE,
			       m->ranges[i].nr * PAGE_SIZE);
	}
}

static void touch_huge(struct huge_machine *m, enum toucher toucher, uint64_t delta)
{
	int ret;

	switch (toucher) {
	case BY_GUEST:
	case BY_EARLIER_CASE:
		guest_does_huge(m, delta, GMEM_ADD, 0, 0);
		break;
	case BY_VMM:
		vmm_does_huge(m, m->mem, GMEM_ADD, 0, 0);
		break;
	case BY_FALLOCATE:
		for (int i = 0; i < m->nr_ranges; i++) {
			ret = fallocate(m->fd, FALLOC_FL_KEEP_SIZE,
					m->ranges[i].first * PAGE_SIZE,
					m->ranges[i].nr * PAGE_SIZE);
			TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("fallocate()", ret));
		}
		break;
	case BY_PRE_FAULT:
		pre_fault_huge(m, delta);
		break;
	default:
		break;
	}
}

static void punch_huge(struct huge_machine *m)
{
	int ret = fallocate(m->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
			    0, m->npages * PAGE_SIZE);

	TEST_ASSERT(!ret, __KVM_SYSCALL_ERROR("fallocate()", ret));
	memset(m->level, 0, m->npages);
	TEST_ASSERT(check_folios(m), "The file should be empty");
}

/* Returns the address that would be of the file's first page. */
static void *map_huge_view(struct huge_machine *m, const struct huge_case *c,
			   void **reserved, size_t *reserved_size)
{
	const size_t size = m->npages * PAGE_SIZE;
	const uint64_t delta = congruence_delta[c->congruence];
	const bool other = c->view == HUGE_OTHER;
	void *mem;

	if (c->view == HUGE_NO_ADDRESS)
		return NULL;

	*reserved_size = size + 2UL * SZ_1G;
	*reserved = mmap(NULL, *reserved_size, PROT_NONE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(*reserved != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));

	mem = align_ptr_up(*reserved, SZ_1G) + delta;
	if (c->view == HUGE_4K_OFF)
		mem += PAGE_SIZE;
	mem = mmap(mem, size, PROT_READ | PROT_WRITE,
		   MAP_FIXED | MAP_NORESERVE |
		   (other ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED),
		   other ? -1 : m->fd, 0);
	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));

	/* Big pages in the other object are the more dangerous ones. */
	madvise(mem, size, c->view == HUGE_SMALL_PAGES || size > SZ_1G ?
			   MADV_NOHUGEPAGE : MADV_HUGEPAGE);
	if (other)
		vmm_does_huge(m, mem, GMEM_SET, OTHER_TAG << 48, 1);
	return mem;
}

/* Count what deleting the memslots zaps, i.e. what they had mapped. */
static struct sptes delete_slots(struct kvm_vm *vm, int nr_slots)
{
	struct sptes sptes = count_all_sptes(vm);

	for (int i = 0; i < nr_slots; i++)
		vm_set_user_memory_region2(vm, TEST_SLOT + i, 0, 0, 0, NULL, 0, 0);

	return sub_sptes(sptes, count_all_sptes(vm));
}

static void assert_huge_sptes(struct huge_machine *m, const struct huge_case *c,
			      struct sptes sptes, const char *when)
{
	struct sptes expected = expected_sptes(m, congruence_delta[c->congruence]);

	TEST_ASSERT(sptes.nr_4k == expected.nr_4k && sptes.nr_2m == expected.nr_2m &&
		    sptes.nr_1g == expected.nr_1g,
		    "SPTEs %s: %lu of 4K, %lu of 2M, %lu of 1G, expected %lu, %lu, %lu\n"
		    "  flags 0x%lx, %lu pages, congruent modulo %s, memslot %s, userspace_addr %s, touched by %s, %s",
		    when, sptes.nr_4k, sptes.nr_2m, sptes.nr_1g, expected.nr_4k, expected.nr_2m,
		    expected.nr_1g, m->flags, m->npages, congruence_names[c->congruence],
		    shape_names[c->shape], huge_view_names[c->view],
		    toucher_names[c->toucher], guest_names[m->guest]);
}

static void add_slots(struct huge_machine *m, void *view, uint64_t delta)
{
	for (int i = 0; i < m->nr_slots; i++)
		vm_set_user_memory_region2(m->vm, TEST_SLOT + i, KVM_MEM_GUEST_MEMFD,
					   TEST_GPA + delta + m->slots[i].first * PAGE_SIZE,
					   m->slots[i].nr * PAGE_SIZE,
					   view ? view + m->slots[i].first * PAGE_SIZE : NULL,
					   m->fd, m->slots[i].first * PAGE_SIZE);
}

/* Returns false if there's not enough contiguous memory. */
static bool test_huge_case(struct huge_machine *m, const struct huge_case *c)
{
	const uint64_t delta = congruence_delta[c->congruence];
	void *reserved = NULL, *view;
	size_t reserved_size = 0;
	bool enough;

	shape_slots(m, c->shape);
	choose_ranges(m, delta);
	if (c->toucher != BY_EARLIER_CASE)
		punch_huge(m);

	view = map_huge_view(m, c, &reserved, &reserved_size);
	add_slots(m, view, delta);
	touch_huge(m, c->toucher, delta);
	model_touch(m);
	enough = check_folios(m);
	if (!enough)
		goto out;
	if (c->toucher == BY_PRE_FAULT) {
		/*
		 * Not by what there was before: to find 1 GiB, the VM's other memory
		 * may have been moved out of the way.
		 */
		assert_huge_sptes(m, c, delete_slots(m->vm, m->nr_slots), "pre-faulted");
		add_slots(m, view, delta);
	}

	if (c->view == HUGE_SMALL_PAGES)
		vmm_does_huge(m, view, GMEM_ADD, 0, 0);

	if (c->toucher != BY_EARLIER_CASE) {
		vmm_does_huge(m, m->mem, GMEM_CHECK, 0, 0);
		guest_does_huge(m, delta, GMEM_CHECK, 0, 0);
	}

	/* Both sides write, both sides check. */
	m->serial += 2;
	guest_does_huge(m, delta, GMEM_SET, gmem_tag(0) + m->serial, GMEM_TAG_STEP);
	vmm_does_huge(m, m->mem, GMEM_CHECK, gmem_tag(0) + m->serial, GMEM_TAG_STEP);
	vmm_does_huge(m, m->mem, GMEM_SET, gmem_tag(0) + m->serial + 1, GMEM_TAG_STEP);
	guest_does_huge(m, delta, GMEM_CHECK, gmem_tag(0) + m->serial + 1, GMEM_TAG_STEP);
	if (c->view == HUGE_OTHER)
		vmm_does_huge(m, view, GMEM_CHECK, OTHER_TAG << 48, 1);
	assert_host_not_asked();
	TEST_ASSERT(check_folios(m), "The file should not have changed");

	assert_huge_sptes(m, c, delete_slots(m->vm, m->nr_slots), "at the end");
out:
	if (!enough)
		delete_slots(m->vm, m->nr_slots);
	if (reserved)
		munmap(reserved, reserved_size);
	return enough;
}

/*
 * Everything with everything, or, to save time, with what differs most: where the
 * memory comes from has nothing to do with who maps it.
 */
static void test_huge_matrix(uint64_t flags, enum guest guest, bool full)
{
	struct huge_machine m;
	struct huge_case c;

	pr_info("%s, flags 0x%lx: 4 MiB\n", guest_names[guest], flags);

	/* Two folios of 2 MiB and a bit. */
	create_huge_machine(&m, flags, 2 * TEST_NPAGES + 3, guest);

	for (c.congruence = 0; c.congruence < NR_CONGRUENCES; c.congruence++) {
		for (c.shape = 0; c.shape < NR_SHAPES; c.shape++) {
			for (c.view = 0; c.view < NR_HUGE_VIEWS; c.view++) {
				if (!full && c.view != HUGE_NO_ADDRESS && c.view != HUGE_OTHER)
					continue;

				for (c.toucher = 0; c.toucher < NR_TOUCHERS; c.toucher++) {
					if (!full && c.toucher != BY_GUEST)
						continue;
					if (c.toucher == BY_PRE_FAULT &&
					    !kvm_check_cap(KVM_CAP_PRE_FAULT_MEMORY))
						continue;
					test_huge_case(&m, &c);
				}
			}
		}
	}

	free_huge_machine(&m);
}

/*
 * Folios of 1 GiB take their time to be zeroed.  Get them in every way once, and
 * use the last one for everything else.
 */
static void test_gigantic_matrix(uint64_t flags)
{
	const bool pre_fault = kvm_check_cap(KVM_CAP_PRE_FAULT_MEMORY);
	struct huge_machine m;
	struct huge_case c = {};

	pr_info("L1, flags 0x%lx: 1 GiB\n", flags);

	create_huge_machine(&m, flags, SZ_1G / PAGE_SIZE + 2 * TEST_NPAGES + 3, L1);

	for (c.toucher = 0; c.toucher < NR_TOUCHERS; c.toucher++) {
		if (c.toucher == BY_PRE_FAULT && !pre_fault)
			continue;
		if (!test_huge_case(&m, &c)) {
			pr_info("Not enough contiguous memory, not testing 1 GiB\n");
			goto out;
		}
	}

	c.toucher = BY_EARLIER_CASE;
	for (c.congruence = 0; c.congruence < NR_CONGRUENCES; c.congruence++) {
		for (c.shape = 0; c.shape < NR_SHAPES; c.shape++) {
			for (c.view = 0; c.view < NR_HUGE_VIEWS; c.view++)
				test_huge_case(&m, &c);
		}
	}
out:
	free_huge_machine(&m);
}

/* 32 SPTEs of 2 MiB and none of 4 KiB, for whatever userspace_addr. */
static void test_64m(void)
{
	const uint64_t size = SZ_64M, npages = size / PAGE_SIZE;
	uint64_t addrs[] = { 0, 0x1000, 0x7f1234567000 };
	struct huge_machine m;
	struct sptes sptes;

	create_huge_machine(&m, GMEM_SHARED | GUEST_MEMFD_FLAG_HUGE_2M, npages, L1);
	add_range(&m, 0, npages);

	for (int i = 0; i < ARRAY_SIZE(addrs); i++) {
		vm_set_user_memory_region2(m.vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD, TEST_GPA,
					   size, (void *)addrs[i], m.fd, 0);
		guest_does_huge(&m, 0, GMEM_ADD, 1, 0);
		vmm_does_huge(&m, m.mem, GMEM_CHECK, 1, 0);
		assert_host_not_asked();

		sptes = delete_slots(m.vm, 1);
		TEST_ASSERT_EQ(sptes.nr_4k, 0);
		TEST_ASSERT_EQ(sptes.nr_2m, 32);
		TEST_ASSERT_EQ(sptes.nr_1g, 0);
		punch_huge(&m);
	}

	free_huge_machine(&m);
}

/* 2 SPTEs of 1 GiB. */
static void test_2g(void)
{
	const uint64_t size = 2UL * SZ_1G;
	struct huge_machine m;
	struct sptes sptes;

	create_huge_machine(&m, GMEM_SHARED | GUEST_MEMFD_FLAG_HUGE_1G, size / PAGE_SIZE, L1);
	vm_set_user_memory_region2(m.vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD, TEST_GPA, size,
				   NULL, m.fd, 0);
	add_range(&m, 12345, 12345 + PREFETCH_NPAGES);
	add_range(&m, SZ_1G / PAGE_SIZE + 54321, SZ_1G / PAGE_SIZE + 54321 + PREFETCH_NPAGES);

	guest_does_huge(&m, 0, GMEM_ADD, 1, 0);
	model_touch(&m);
	if (check_folios(&m)) {
		sptes = delete_slots(m.vm, 1);
		TEST_ASSERT_EQ(sptes.nr_4k, 0);
		TEST_ASSERT_EQ(sptes.nr_2m, 0);
		TEST_ASSERT_EQ(sptes.nr_1g, 2);
	} else {
		pr_info("Only 0x%lx bytes of contiguous memory, not testing 2 GiB\n",
			gmem_fdinfo(m.fd, "gmem_1g"));
	}

	free_huge_machine(&m);
}

static void assert_private_sptes(struct kvm_vm *vm, struct kvm_vcpu *vcpu,
				 const struct gmem_work *work, int fd,
				 uint64_t nr_4k, uint64_t nr_2m)
{
	const uint64_t size = work->nr * PAGE_SIZE;
	struct sptes sptes;

	gmem_vcpu_run(vcpu, work);
	sptes = delete_slots(vm, 1);
	TEST_ASSERT_EQ(sptes.nr_4k, nr_4k);
	TEST_ASSERT_EQ(sptes.nr_2m, nr_2m);
	TEST_ASSERT_EQ(gmem_fdinfo(fd, "gmem_2m"), size);

	/* Map it again, the same way. */
	vm_set_user_memory_region2(vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD, TEST_GPA, size,
				   NULL, fd, 0);
	gmem_vcpu_run(vcpu, work);
}

/*
 * Private memory is huge as well.  A page that's converted splits the mapping,
 * when it's converted back, the mapping is huge again.  The file has both, so
 * the memory stays.
 */
static void test_huge_private_memory(void)
{
	const uint64_t flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_HUGE_2M;
	const uint64_t size = 2UL * SZ_2M, npages = size / PAGE_SIZE;
	struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = KVM_X86_SW_PROTECTED_VM,
	};
	struct gmem_work work = {
		.gva = TEST_GPA,
		.nr = npages,
		.stride = PAGE_SIZE,
		.val = gmem_tag(0),
		.step = GMEM_TAG_STEP,
	};
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	int fd;

	vm = __vm_create_shape_with_one_vcpu(shape, &vcpu, 4 * npages, gmem_guest_code);
	vcpu_args_set(vcpu, 1, 0ul);
	gmem_map_in_guest(vm, TEST_GPA, size, PG_LEVEL_2M);
	fd = vm_create_guest_memfd(vm, size, flags);
	vm_set_user_memory_region2(vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD, TEST_GPA, size,
				   NULL, fd, 0);
	vm_mem_set_private(vm, TEST_GPA, size);

	work.op = GMEM_SET;
	assert_private_sptes(vm, vcpu, &work, fd, 0, 2);

	work.op = GMEM_CHECK;
	vm_mem_set_shared(vm, TEST_GPA + 7 * PAGE_SIZE, PAGE_SIZE);
	assert_private_sptes(vm, vcpu, &work, fd, npages / 2, 1);

	vm_mem_set_private(vm, TEST_GPA + 7 * PAGE_SIZE, PAGE_SIZE);
	assert_private_sptes(vm, vcpu, &work, fd, 0, 2);
	assert_host_not_asked();

	kvm_vm_free(vm);
	close(fd);
}

static void test_huge_pages(void)
{
	const uint64_t supported = kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS);
	const uint64_t flags[] = {
		GUEST_MEMFD_FLAG_HUGE_2M, GUEST_MEMFD_FLAG_HUGE_1G, GMEM_HUGE,
	};
	enum guest guest;

	if (supported & GUEST_MEMFD_FLAG_HUGE_1G)
		test_2g();
	if (supported & GUEST_MEMFD_FLAG_HUGE_2M)
		test_64m();
	if ((supported & GUEST_MEMFD_FLAG_HUGE_2M) &&
	    (kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		test_huge_private_memory();

	for (int i = 0; i < ARRAY_SIZE(flags); i++) {
		if (flags[i] & ~supported) {
			pr_info("Flags 0x%lx: not supported\n", flags[i]);
			continue;
		}

		if (flags[i] & GUEST_MEMFD_FLAG_HUGE_1G)
			test_gigantic_matrix(GMEM_SHARED | flags[i]);

		/* What is too small for 1 GiB has nothing to do with that flag. */
		for (guest = 0; guest < NR_GUESTS; guest++) {
			const bool full = guest == L1 && flags[i] == GUEST_MEMFD_FLAG_HUGE_2M;

			if (guest_possible(guest))
				test_huge_matrix(GMEM_SHARED | flags[i], guest, full);
			if (flags[i] & GUEST_MEMFD_FLAG_HUGE_1G)
				break;
		}
	}
}

int main(int argc, char *argv[])
{
	struct config config = {
		.gmem_flags = GMEM_SHARED,
	};

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD_FLAGS));
	TEST_REQUIRE(!(config.gmem_flags & ~kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS)));
	gmem_stop_numa_balancing();

	atexit(remove_probes);
	install_probe(&host_level_probe);
	install_probe(&gmem_level_probe);

	test_host_asked_for_anonymous_memory();
	test_huge_pages();

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
