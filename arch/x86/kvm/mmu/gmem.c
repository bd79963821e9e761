// SPDX-License-Identifier: GPL-2.0
/*
 * The x86 MMU's questions to guest_memfd: which page backs a gfn, and how big
 * may the guest map it?  For a memslot whose only source of memory is a
 * guest_memfd the file is the authority on both, no matter what the memslot's
 * userspace_addr points at.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include "mmu.h"
#include "mmu_internal.h"

static u8 kvm_max_level_for_order(int order)
{
	BUILD_BUG_ON(KVM_MAX_HUGEPAGE_LEVEL > PG_LEVEL_1G);

	KVM_MMU_WARN_ON(order != KVM_HPAGE_GFN_SHIFT(PG_LEVEL_1G) &&
			order != KVM_HPAGE_GFN_SHIFT(PG_LEVEL_2M) &&
			order != KVM_HPAGE_GFN_SHIFT(PG_LEVEL_4K));

	if (order >= KVM_HPAGE_GFN_SHIFT(PG_LEVEL_1G))
		return PG_LEVEL_1G;

	if (order >= KVM_HPAGE_GFN_SHIFT(PG_LEVEL_2M))
		return PG_LEVEL_2M;

	return PG_LEVEL_4K;
}

/*
 * The biggest level at which the file allows @gfn to be mapped.  With a @fault,
 * the file was asked when the pfn was gotten.  Without, e.g. to find out whether
 * a mapping could be bigger than it is, ask for what's there.  The latter can be
 * called with mmu_lock held, and the answer is stale as soon as it's given, i.e.
 * must not be used to install a mapping.
 */
u8 kvm_gmem_max_mapping_level(struct kvm *kvm, struct kvm_page_fault *fault,
			      const struct kvm_memory_slot *slot, gfn_t gfn,
			      bool is_private)
{
	u8 max_level, vendor_level;
	kvm_pfn_t pfn;
	int order;

	if (fault) {
		pfn = fault->pfn;
		order = fault->gmem_order;
	} else {
		pfn = kvm_gmem_lookup_pfn(slot, gfn, &order);
		if (is_error_pfn(pfn))
			return PG_LEVEL_4K;
	}

	max_level = kvm_max_level_for_order(order);
	if (max_level > PG_LEVEL_4K) {
		/* Confidential VMs have reasons of their own to map less. */
		vendor_level = kvm_x86_call(gmem_max_mapping_level)(kvm, pfn,
								    is_private);
		if (vendor_level)
			max_level = min(max_level, vendor_level);
	}

	if (!fault)
		kvm_release_pfn_clean(pfn);

	return max_level;
}

int kvm_mmu_faultin_pfn_gmem(struct kvm_vcpu *vcpu, struct kvm_page_fault *fault)
{
	struct kvm_memory_slot *slot = fault->slot;
	int r;

	if (!kvm_slot_has_gmem(slot)) {
		kvm_mmu_prepare_memory_fault_exit(vcpu, fault);
		return -EFAULT;
	}

	/*
	 * Protections are those of the memslot.  Check them first, there is no
	 * point in allocating memory for what's going to be emulated.
	 */
	if (fault->write && (slot->flags & KVM_MEM_READONLY)) {
		fault->pfn = KVM_PFN_ERR_RO_FAULT;
		return RET_PF_CONTINUE;
	}

	r = kvm_gmem_get_pfn(vcpu->kvm, slot, fault->gfn, &fault->pfn,
			     &fault->gmem_order);
	if (r) {
		/* KVM_EXIT_MEMORY_FAULT goes with these errors only. */
		if (r == -EFAULT || r == -EHWPOISON)
			kvm_mmu_prepare_memory_fault_exit(vcpu, fault);
		return r;
	}

	fault->map_writable = !(slot->flags & KVM_MEM_READONLY);
	return RET_PF_CONTINUE;
}

/*
 * Get the pfn of @gfn for a mapping that nobody asked for, i.e. only if that
 * takes neither an allocation nor sleeping.  To be called with mmu_lock held and
 * no invalidation in progress, then the page cannot go away until the mapping is
 * installed: removing it from the file begins with an invalidation.
 *
 * Returns an error pfn if there's nothing to be mapped.
 */
kvm_pfn_t kvm_mmu_gmem_prefetch_pfn(struct kvm *kvm,
				    const struct kvm_memory_slot *slot, gfn_t gfn)
{
	lockdep_assert_held_write(&kvm->mmu_lock);

	/* Not all guest modes may access private memory, leave it to a fault. */
	if (kvm_mem_is_private(kvm, gfn))
		return KVM_PFN_ERR_FAULT;

	/* Prefetching installs writable mappings. */
	if (slot->flags & KVM_MEM_READONLY)
		return KVM_PFN_ERR_FAULT;

	return kvm_gmem_lookup_pfn(slot, gfn, NULL);
}
