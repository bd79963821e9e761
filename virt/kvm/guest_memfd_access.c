// SPDX-License-Identifier: GPL-2.0
/*
 * KVM's own accesses to memory of gmem-only memslots, on behalf of the guest or
 * of the VMM.  This is the one place that gets from a gfn to something that the
 * kernel can access.  It does so through the file, as the memslot's
 * userspace_addr need not point at the memory, or at anything.
 *
 * Accesses race with memory being removed from the file.  The rules are:
 *
 *  - Writing holds invalidate_lock shared, from looking up the page until after
 *    the copy.  Hence a write is either removed along with the page, or goes to
 *    the page that replaces it.  Once fallocate() has returned, there is no write
 *    that still goes to the old page and thus gets lost.
 *
 *  - Reading takes what's in the file already by lockless look-up, i.e. can read
 *    a page that is being removed, with what was last written to it.  What isn't
 *    there is allocated as for a write.
 *
 *  - Whoever wants a pfn gets it with a reference to the folio, i.e. can't touch
 *    memory that has been freed.  If the page is removed from the file while the
 *    reference is held, accesses go to what has been the guest's memory, and are
 *    of no consequence.  Who keeps the pfn for longer than the memslot's file is
 *    guaranteed to keep it must either observe the file's invalidations, as the
 *    pfn cache does, or hold on to the reference, i.e. pin the page, as
 *    kvm_vcpu_map() does.
 *
 *  - Accesses that cannot sleep get what's in the file already, by lockless
 *    look-up, and fail if there's nothing.  They're read-only, and for users
 *    that revalidate what they've read or that hold mmu_lock, i.e. that are
 *    going to be told if the memory was removed.
 *
 * All of them require that the memslot stays, i.e. kvm->srcu or slots_lock, and
 * none may be used with invalidate_lock held.
 */
#include <linux/highmem.h>
#include <linux/pagemap.h>
#include <linux/uaccess.h>
#include <linux/unaligned.h>

#include "guest_memfd.h"
#include "kvm_mm.h"

struct kvm_gmem_access {
	struct file *file;
	struct folio *folio;
	struct page *page;
};

static bool kvm_gmem_slot_permits(const struct kvm_memory_slot *slot, bool write)
{
	if (slot->flags & KVM_MEMSLOT_INVALID)
		return false;

	return !write || !(slot->flags & KVM_MEM_READONLY);
}

static void kvm_gmem_end_access(struct kvm_gmem_access *access)
{
	folio_put(access->folio);
	filemap_invalidate_unlock_shared(access->file->f_mapping);
}

/* May sleep, and allocates the page if there is none. */
static int kvm_gmem_begin_access(const struct kvm_memory_slot *slot, gfn_t gfn,
				 bool write, struct kvm_gmem_access *access)
{
	pgoff_t index = kvm_gmem_get_index(slot, gfn);
	struct folio *folio;
	struct file *file;
	int r;

	might_sleep();

	if (!kvm_gmem_slot_permits(slot, write))
		return -EFAULT;

	file = kvm_gmem_slot_file(slot);
	if (!file)
		return -EFAULT;

	filemap_invalidate_lock_shared(file->f_mapping);

	r = -EFAULT;
	/*
	 * The file may have been closed since it was looked up.  Private memory is
	 * out of reach, as it is for a userspace mapping.
	 */
	if (file != kvm_gmem_slot_file(slot) ||
	    !kvm_gmem_is_shared(file_inode(file)))
		goto err;

	/*
	 * Nothing is split or removed as long as invalidate_lock is held.  Lock
	 * a folio only if that's needed to allocate or to wait for the zeroing,
	 * it may be the one that all vCPUs have their page tables in.
	 */
	folio = filemap_get_folio(file->f_mapping, index);
	if (IS_ERR(folio) || !folio_test_uptodate(folio)) {
		if (!IS_ERR(folio))
			folio_put(folio);

		folio = kvm_gmem_get_folio(file_inode(file), index, false);
		if (IS_ERR(folio)) {
			r = PTR_ERR(folio);
			goto err;
		}
		folio_unlock(folio);
	}

	if (kvm_gmem_is_poisoned(folio, index)) {
		folio_put(folio);
		r = -EHWPOISON;
		goto err;
	}

	access->file = file;
	access->folio = folio;
	access->page = folio_file_page(folio, index);
	return 0;

err:
	filemap_invalidate_unlock_shared(file->f_mapping);
	return r;
}

/* Neither sleeps nor allocates.  Returns the page with a reference, or NULL. */
static struct page *kvm_gmem_lookup_page(const struct kvm_memory_slot *slot,
					 gfn_t gfn, bool write)
{
	pgoff_t index = kvm_gmem_get_index(slot, gfn);
	struct file *file = kvm_gmem_slot_file(slot);
	struct folio *folio;

	if (!file || !kvm_gmem_slot_permits(slot, write) ||
	    !kvm_gmem_is_shared(file_inode(file)))
		return NULL;

	folio = kvm_gmem_lookup_folio(file, index);
	return folio ? folio_file_page(folio, index) : NULL;
}

#ifndef kvm_arch_gmem_load
#define kvm_arch_gmem_load(src, val)						\
({										\
	*(val) = READ_ONCE(*(src));						\
	0;									\
})
#endif

#define kvm_gmem_load(type, src, data)						\
({										\
	type __val;								\
	int __r = kvm_arch_gmem_load((const type *)(src), &__val);		\
										\
	put_unaligned(__val, (type *)(data));					\
	__r;									\
})

/*
 * The guest may rely on naturally aligned accesses being done in one piece, e.g.
 * to its page tables.  The host survives reading memory that turns out to be bad,
 * as it would through a userspace mapping.
 */
static int kvm_gmem_copy_from_page(struct page *page, int offset, void *data,
				   int len)
{
	void *src = kmap_local_page(page) + offset;
	int r;

	if (IS_ALIGNED(offset, len) && len == 8)
		r = kvm_gmem_load(u64, src, data);
	else if (IS_ALIGNED(offset, len) && len == 4)
		r = kvm_gmem_load(u32, src, data);
	else if (IS_ALIGNED(offset, len) && len == 2)
		r = kvm_gmem_load(u16, src, data);
	else
		r = copy_mc_to_kernel(data, src, len) ? -EHWPOISON : 0;

	kunmap_local(src);
	return r;
}

static void kvm_gmem_copy_to_page(struct page *page, int offset, const void *data,
				  int len)
{
	void *dst = kmap_local_page(page) + offset;

	if (!IS_ALIGNED(offset, len))
		memcpy(dst, data, len);
	else if (len == 8)
		WRITE_ONCE(*(u64 *)dst, get_unaligned((const u64 *)data));
	else if (len == 4)
		WRITE_ONCE(*(u32 *)dst, get_unaligned((const u32 *)data));
	else if (len == 2)
		WRITE_ONCE(*(u16 *)dst, get_unaligned((const u16 *)data));
	else
		memcpy(dst, data, len);

	kunmap_local(dst);
}

/*
 * Read from a page of gmem, and tell @page, unless that's NULL, which one it was,
 * for kvm_gmem_read_again().  There's no reference to it.
 */
int kvm_gmem_read(const struct kvm_memory_slot *slot, gfn_t gfn, int offset,
		  void *data, int len, struct page **page)
{
	struct file *file = kvm_gmem_slot_file(slot);
	struct kvm_gmem_access access;
	struct page *found = NULL;
	int r;

	might_sleep();

	if (!file)
		return -EFAULT;

	if (!READ_ONCE(GMEM_I(file_inode(file))->shrinking))
		found = kvm_gmem_lookup_page(slot, gfn, false);
	if (found) {
		r = kvm_gmem_copy_from_page(found, offset, data, len);
		put_page(found);
	} else {
		r = kvm_gmem_begin_access(slot, gfn, false, &access);
		if (r)
			return r;

		found = access.page;
		r = kvm_gmem_copy_from_page(found, offset, data, len);
		kvm_gmem_end_access(&access);
	}

	if (page)
		*page = found;
	return r;
}

/*
 * Read from the @page that kvm_gmem_read() has found.  To take it away from the
 * file begins with an invalidation, i.e. if there's been none since before it was
 * found, it's still there, and remains until mmu_lock is dropped, just like what
 * SPTEs map.  Returns -EAGAIN if it has to be looked up again.
 */
int kvm_gmem_read_again(struct kvm *kvm, struct page *page, unsigned long mmu_seq,
			int offset, void *data, int len)
{
	lockdep_assert_held(&kvm->mmu_lock);

	if (mmu_invalidate_retry(kvm, mmu_seq))
		return -EAGAIN;

	return kvm_gmem_copy_from_page(page, offset, data, len);
}

int kvm_gmem_read_atomic(const struct kvm_memory_slot *slot, gfn_t gfn, int offset,
			 void *data, int len)
{
	struct page *page = kvm_gmem_lookup_page(slot, gfn, false);
	int r;

	if (!page)
		return -EFAULT;

	r = kvm_gmem_copy_from_page(page, offset, data, len);
	put_page(page);
	return r;
}

/* Marking the page dirty is up to the caller. */
int kvm_gmem_write(const struct kvm_memory_slot *slot, gfn_t gfn, int offset,
		   const void *data, int len)
{
	struct kvm_gmem_access access;
	int r;

	r = kvm_gmem_begin_access(slot, gfn, true, &access);
	if (r)
		return r;

	kvm_gmem_copy_to_page(access.page, offset, data, len);
	kvm_gmem_end_access(&access);
	return 0;
}

/*
 * Atomically replace @old by @new at @gpa, which is part of a gmem-only memslot.
 * Returns 1 if there was something else in memory, and updates @old, i.e. is what
 * __try_cmpxchg_user() is for memory in userspace.  The access must not cross a
 * page.  Marking the page dirty is up to the caller.
 */
int kvm_vcpu_cmpxchg_gmem(struct kvm_vcpu *vcpu, gpa_t gpa, void *old,
			  const void *new, int len)
{
	gfn_t gfn = gpa >> PAGE_SHIFT;
	struct kvm_memory_slot *slot = kvm_vcpu_gfn_to_memslot(vcpu, gfn);
	struct kvm_gmem_access access;
	void *ptr;
	int r;

	if (!kvm_memslot_is_gmem_only(slot))
		return -EFAULT;

	r = kvm_gmem_begin_access(slot, gfn, true, &access);
	if (r)
		return r;

	ptr = kmap_local_page(access.page) + offset_in_page(gpa);

	switch (len) {
	case 1:
		r = !try_cmpxchg((u8 *)ptr, (u8 *)old, *(const u8 *)new);
		break;
	case 2:
		r = !try_cmpxchg((u16 *)ptr, (u16 *)old, *(const u16 *)new);
		break;
	case 4:
		r = !try_cmpxchg((u32 *)ptr, (u32 *)old, *(const u32 *)new);
		break;
	case 8:
		r = !try_cmpxchg((u64 *)ptr, (u64 *)old, *(const u64 *)new);
		break;
	default:
		WARN_ON_ONCE(1);
		r = -EINVAL;
	}

	kunmap_local(ptr);
	kvm_gmem_end_access(&access);
	return r;
}

/*
 * Get the pfn that KVM itself may access @gfn with, along with a reference that
 * is put by kvm_release_pfn_{clean,dirty}().
 */
kvm_pfn_t kvm_gmem_access_pfn(const struct kvm_memory_slot *slot, gfn_t gfn,
			      bool atomic, bool write)
{
	struct kvm_gmem_access access;
	struct page *page;
	int r;

	if (slot->flags & KVM_MEMSLOT_INVALID)
		return KVM_PFN_NOSLOT;

	if (!kvm_gmem_slot_permits(slot, write))
		return KVM_PFN_ERR_RO_FAULT;

	if (atomic) {
		page = kvm_gmem_lookup_page(slot, gfn, write);
		return page ? page_to_pfn(page) : KVM_PFN_ERR_FAULT;
	}

	r = kvm_gmem_begin_access(slot, gfn, write, &access);
	if (r)
		return r == -EHWPOISON ? KVM_PFN_ERR_HWPOISON : KVM_PFN_ERR_FAULT;

	get_page(access.page);
	kvm_gmem_end_access(&access);
	return page_to_pfn(access.page);
}

/*
 * Identify the page that backs @gfn of a gmem-only memslot, for writing, by file
 * and index in the file.  NULL if there's no such page.  The file must not be
 * dereferenced.
 */
struct file *kvm_gmem_identify(const struct kvm_memory_slot *slot, gfn_t gfn,
			       pgoff_t *index)
{
	if (!kvm_memslot_is_gmem_only(slot) || !kvm_gmem_slot_permits(slot, true))
		return NULL;

	*index = kvm_gmem_get_index(slot, gfn);
	return kvm_gmem_slot_file(slot);
}
