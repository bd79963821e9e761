// SPDX-License-Identifier: GPL-2.0
/*
 * The VMM's view of a guest_memfd: mappings of the file into user page tables,
 * and the NUMA policy that is set through them.  None of this has any influence
 * on what the guest maps.
 */
#include <linux/mempolicy.h>
#include <linux/mm.h>
#include <linux/pagemap.h>

#include "guest_memfd.h"

static vm_fault_t kvm_gmem_fault_user_mapping(struct vm_fault *vmf)
{
	struct inode *inode = file_inode(vmf->vma->vm_file);
	struct folio *folio;
	vm_fault_t ret;

	/* mremap() lets a mapping grow past what a loff_t can express. */
	if (vmf->pgoff >= i_size_read(inode) >> PAGE_SHIFT)
		return VM_FAULT_SIGBUS;

	/* Userspace has no business with private memory. */
	if (!kvm_gmem_is_shared(inode))
		return VM_FAULT_SIGBUS;

	/*
	 * Neither create nor find memory that is being taken away.  Unlike what a
	 * vCPU has found, it would be mapped: nothing tells mm to retry.
	 */
	filemap_invalidate_lock_shared(inode->i_mapping);

	folio = kvm_gmem_get_folio(inode, vmf->pgoff, false);
	if (IS_ERR(folio)) {
		ret = vmf_error(PTR_ERR(folio));
		goto out;
	}

	/*
	 * Do not leave poison to the caller, which would respond by trying to
	 * evict the folio.
	 */
	if (kvm_gmem_is_poisoned(folio, vmf->pgoff)) {
		folio_unlock(folio);
		folio_put(folio);
		ret = VM_FAULT_HWPOISON;
		goto out;
	}

	vmf->page = folio_file_page(folio, vmf->pgoff);
	ret = VM_FAULT_LOCKED;
out:
	filemap_invalidate_unlock_shared(inode->i_mapping);
	return ret;
}

/*
 * Map what the file holds around an address that is read.  Called in an RCU
 * read-side section: leave it to the fault to wait for a hole.
 */
static vm_fault_t kvm_gmem_map_pages(struct vm_fault *vmf, pgoff_t start, pgoff_t end)
{
	struct inode *inode = file_inode(vmf->vma->vm_file);
	vm_fault_t ret;

	/* See kvm_gmem_fault_user_mapping(). */
	if (vmf->pgoff >= i_size_read(inode) >> PAGE_SHIFT ||
	    !kvm_gmem_is_shared(inode))
		return 0;

	if (!filemap_invalidate_trylock_shared(inode->i_mapping))
		return 0;

	ret = filemap_map_pages(vmf, start, end);

	filemap_invalidate_unlock_shared(inode->i_mapping);
	return ret;
}

#ifdef CONFIG_NUMA
/*
 * Return the policy for @index with a reference to be dropped by
 * mpol_cond_put(), or NULL if none was set, i.e. if the policy of the
 * allocating task applies.  @ilx is what distinguishes the file from others
 * when interleaving, to be added to the index.
 */
struct mempolicy *kvm_gmem_get_mpol(struct inode *inode, pgoff_t index,
				    pgoff_t *ilx)
{
	*ilx = inode->i_ino;

	return mpol_shared_policy_lookup(&GMEM_I(inode)->policy, index);
}

/*
 * Return true if a folio may have all of the range from @start to @last, i.e. if no
 * policy begins or ends in it: one folio can obey only one of them.
 */
bool kvm_gmem_has_one_policy(struct inode *inode, pgoff_t start, pgoff_t last)
{
	struct shared_policy *policy = &GMEM_I(inode)->policy;
	struct sp_node *node, *first = NULL;
	struct rb_node *n;
	bool ret;

	read_lock(&policy->lock);

	/* The nodes don't overlap, and their ends are exclusive. */
	for (n = policy->root.rb_node; n; ) {
		node = rb_entry(n, struct sp_node, nd);
		if (node->end > start) {
			first = node;
			n = n->rb_left;
		} else {
			n = n->rb_right;
		}
	}

	ret = !first || first->start > last ||
	      (first->start <= start && first->end > last);

	read_unlock(&policy->lock);
	return ret;
}

static int kvm_gmem_set_policy(struct vm_area_struct *vma, struct mempolicy *mpol)
{
	struct inode *inode = file_inode(vma->vm_file);

	return mpol_set_shared_policy(&GMEM_I(inode)->policy, vma, mpol);
}

static struct mempolicy *kvm_gmem_get_policy(struct vm_area_struct *vma,
					     unsigned long addr, pgoff_t *ilx)
{
	pgoff_t index = vma->vm_pgoff + ((addr - vma->vm_start) >> PAGE_SHIFT);

	return kvm_gmem_get_mpol(file_inode(vma->vm_file), index, ilx);
}
#endif

static const struct vm_operations_struct kvm_gmem_vm_ops = {
	.fault		= kvm_gmem_fault_user_mapping,
	.map_pages	= kvm_gmem_map_pages,
#ifdef CONFIG_NUMA
	.get_policy	= kvm_gmem_get_policy,
	.set_policy	= kvm_gmem_set_policy,
#endif
};

int kvm_gmem_mmap(struct file *file, struct vm_area_struct *vma)
{
	if (!(GMEM_I(file_inode(file))->flags & GUEST_MEMFD_FLAG_MMAP))
		return -ENODEV;

	/* A private copy of guest memory makes no sense, e.g. after fork(). */
	if ((vma->vm_flags & (VM_SHARED | VM_MAYSHARE)) !=
	    (VM_SHARED | VM_MAYSHARE))
		return -EINVAL;

	vma->vm_ops = &kvm_gmem_vm_ops;
	return 0;
}
