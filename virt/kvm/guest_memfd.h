/* SPDX-License-Identifier: GPL-2.0 */
#ifndef __KVM_GUEST_MEMFD_H
#define __KVM_GUEST_MEMFD_H

#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/mempolicy.h>

/*
 * The private state of guest_memfd.  A guest_memfd is an inode, i.e. memory,
 * and a file, i.e. one VM's view of that memory.  Nothing in here is visible
 * outside of virt/kvm/guest_memfd*.c.
 */

/* One VM's view of the memory, a.k.a. file->private_data. */
struct kvm_gmem {
	struct kvm *kvm;
	/* The file that this is the private_data of. */
	struct file *file;
	/* Interval tree of kvm_memory_slot.gmem.node, in units of pages. */
	struct rb_root_cached bindings;
	struct list_head entry;
};

/*
 * The memory itself.
 *
 * Locking, outermost first:
 *
 *   kvm->slots_lock
 *     mapping->invalidate_lock
 *       folio lock
 *         bindings_lock
 *           kvm->mmu_lock
 *
 * invalidate_lock is held exclusive to take memory away and to change the
 * bindings, shared to add memory, to map it into user page tables, and for KVM
 * itself to write to it or to pin it.  A vCPU's fault, and KVM's reads, find what's
 * there without a lock.  bindings_lock is for the one event that arrives with a folio
 * locked, i.e. that cannot take invalidate_lock: a memory error.  Changing the
 * bindings requires both locks, walking them requires either.
 */
struct kvm_gmem_inode {
	/* GUEST_MEMFD_FLAG_*, immutable. */
	u64 flags;
	/* Pinned by the inode, NULL for that of the mount's root. */
	struct module *owner;
	/* See above, nests inside the folio lock. */
	struct mutex bindings_lock;
	/* Set by mbind(), obeyed by every allocation. */
	struct shared_policy policy;

	/*
	 * Held to add a folio of 1 GiB, nests inside invalidate_lock and outside
	 * of the new folio's lock.  Protects the back-off, which is in jiffies.
	 */
	struct mutex gigantic_lock;
	unsigned long gigantic_retry;
	int gigantic_failures;

	/*
	 * True while memory is taken away.  Those that can sleep then had better
	 * wait for invalidate_lock: a reference keeps a folio from being split.
	 */
	bool shrinking;
	/* The one folio that may be split, protected by invalidate_lock. */
	struct folio *split_folio;
	/* True once a page of a large folio was poisoned. */
	bool has_poison;

	struct inode vfs_inode;
};

static inline struct kvm_gmem_inode *GMEM_I(struct inode *inode)
{
	return container_of(inode, struct kvm_gmem_inode, vfs_inode);
}

/*
 * True if all memory of the file is shared, i.e. may be accessed by userspace
 * and KVM, false if all of it is private.
 */
static inline bool kvm_gmem_is_shared(struct inode *inode)
{
	return GMEM_I(inode)->flags & GUEST_MEMFD_FLAG_INIT_SHARED;
}

/*
 * The file that a memslot is bound to, or NULL.  Whoever may look at the memslot,
 * i.e. holds kvm->srcu or kvm->slots_lock, may look at the file as well, and needs
 * no reference: kvm_gmem_release() waits for them.  It may be closed meanwhile, in
 * which case the memslot has none any more, and the memory is invalidated.
 */
static inline struct file *kvm_gmem_slot_file(const struct kvm_memory_slot *slot)
{
	return READ_ONCE(slot->gmem.file);
}

static inline pgoff_t kvm_gmem_get_index(const struct kvm_memory_slot *slot, gfn_t gfn)
{
	return gfn - slot->base_gfn + slot->gmem.pgoff;
}

struct folio *kvm_gmem_lookup_folio(struct file *file, pgoff_t index);
int kvm_gmem_mmap(struct file *file, struct vm_area_struct *vma);
#ifdef CONFIG_NUMA
struct mempolicy *kvm_gmem_get_mpol(struct inode *inode, pgoff_t index,
				    pgoff_t *ilx);
bool kvm_gmem_has_one_policy(struct inode *inode, pgoff_t start, pgoff_t last);
#else
static inline struct mempolicy *kvm_gmem_get_mpol(struct inode *inode,
						  pgoff_t index, pgoff_t *ilx)
{
	return NULL;
}

static inline bool kvm_gmem_has_one_policy(struct inode *inode, pgoff_t start,
					   pgoff_t last)
{
	return true;
}
#endif

void kvm_gmem_handle_poison(struct inode *inode, pgoff_t start, pgoff_t end);

int kvm_gmem_max_order(struct inode *inode);
int kvm_gmem_mapping_order(const struct kvm_memory_slot *slot, gfn_t gfn,
			   struct folio *folio);
bool kvm_gmem_is_poisoned(struct folio *folio, pgoff_t index);
struct folio *kvm_gmem_get_folio(struct inode *inode, pgoff_t index, bool populate);
int kvm_gmem_remove_range(struct inode *inode, pgoff_t start, pgoff_t end);
bool kvm_gmem_release_folio(struct folio *folio, gfp_t gfp);
void kvm_gmem_retain_poison(struct folio *folio);
void kvm_gmem_evict_inode(struct inode *inode);
void kvm_gmem_show_fdinfo(struct seq_file *m, struct file *file);

#endif /* __KVM_GUEST_MEMFD_H */
