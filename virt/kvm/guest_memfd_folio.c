// SPDX-License-Identifier: GPL-2.0
/*
 * The folios of a guest_memfd: which size they are allocated in, how they are
 * zeroed, split and counted, and what happens to poisoned ones.
 *
 * Folios are of PAGE_SIZE, PMD_SIZE or PUD_SIZE, and nobody but guest_memfd
 * changes that: they are neither reclaimed nor migrated, and are split only
 * below.  mm/ asks by ->release_folio before it tries.
 */
#include <linux/cpuset.h>
#include <linux/delay.h>
#include <linux/highmem.h>
#include <linux/huge_mm.h>
#include <linux/mempolicy.h>
#include <linux/pagemap.h>
#include <linux/rcupdate_wait.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/swap.h>

#include "guest_memfd.h"

#define CREATE_TRACE_POINTS
#include <trace/events/guest_memfd.h>

#define GMEM_ORDER_2M	(PMD_SHIFT - PAGE_SHIFT)
#define GMEM_ORDER_1G	(PUD_SHIFT - PAGE_SHIFT)

/* How many times 50 to 100 us to wait for references that are not there to stay. */
#define GMEM_PATIENCE	20

/* Biggest first, i.e. in the order in which they are tried. */
static const int kvm_gmem_orders[] = { GMEM_ORDER_1G, GMEM_ORDER_2M, 0 };

static bool kvm_gmem_may_have_order(struct inode *inode, int order)
{
	u64 flags = GMEM_I(inode)->flags;

	if (order == GMEM_ORDER_1G)
		return flags & GUEST_MEMFD_FLAG_HUGE_1G;

	return !order || (flags & GUEST_MEMFD_FLAG_HUGE_2M);
}

int kvm_gmem_max_order(struct inode *inode)
{
	int i;

	for (i = 0; !kvm_gmem_may_have_order(inode, kvm_gmem_orders[i]); i++)
		;

	return kvm_gmem_orders[i];
}

static bool kvm_gmem_range_is_poisoned(struct folio *folio, pgoff_t index, long nr)
{
	long i;

	if (!folio_test_large(folio))
		return folio_test_hwpoison(folio);

	/* Don't look at 262144 pages for what the folio knows. */
	if (!folio_test_has_hwpoisoned(folio) || nr == folio_nr_pages(folio))
		return folio_test_has_hwpoisoned(folio);

	for (i = 0; i < nr; i++) {
		if (PageHWPoison(folio_file_page(folio, index + i)))
			return true;
	}

	return false;
}

bool kvm_gmem_is_poisoned(struct folio *folio, pgoff_t index)
{
	return kvm_gmem_range_is_poisoned(folio, index, 1);
}

/*
 * The biggest order in which @gfn can be mapped, given that its memory is part
 * of @folio: the naturally aligned block around it must be aligned in the file,
 * too, be part of the folio, lie inside of the memslot, and be free of poison.
 */
int kvm_gmem_mapping_order(const struct kvm_memory_slot *slot, gfn_t gfn,
			   struct folio *folio)
{
	pgoff_t index = gfn - slot->base_gfn + slot->gmem.pgoff;
	int i;

	for (i = 0; i < ARRAY_SIZE(kvm_gmem_orders); i++) {
		int order = kvm_gmem_orders[i];
		long nr = 1L << order;
		gfn_t base = round_down(gfn, nr);

		if (order > folio_order(folio))
			continue;

		if ((gfn ^ index) & (nr - 1))
			continue;

		if (base < slot->base_gfn ||
		    base + nr > slot->base_gfn + slot->npages)
			continue;

		if (order &&
		    kvm_gmem_range_is_poisoned(folio, round_down(index, nr), nr))
			continue;

		return order;
	}

	return 0;
}

#ifdef CONFIG_CONTIG_ALLOC
#ifdef CONFIG_NUMA
static int kvm_gmem_interleave_nid(nodemask_t *nodes, pgoff_t ilx)
{
	unsigned int i = ilx % nodes_weight(*nodes);
	int nid = first_node(*nodes);

	while (i--)
		nid = next_node(nid, *nodes);

	return nid;
}

static struct folio *kvm_gmem_alloc_gigantic(gfp_t gfp, int order,
					     struct mempolicy *mpol, pgoff_t ilx)
{
	nodemask_t allowed = cpuset_current_mems_allowed, nodes;
	int nid = numa_node_id();
	struct folio *folio;

	/* The contiguous allocator knows no policies, not even the task's. */
	if (!mpol)
		mpol = current->mempolicy;
	if (!mpol || mpol->mode == MPOL_LOCAL)
		return folio_alloc_gigantic(order, gfp, nid, &allowed);

	nodes_and(nodes, mpol->nodes, allowed);
	if (nodes_empty(nodes))
		nodes = allowed;
	if (!node_isset(nid, nodes))
		nid = first_node(nodes);

	switch (mpol->mode) {
	case MPOL_INTERLEAVE:
	case MPOL_WEIGHTED_INTERLEAVE:
		nid = kvm_gmem_interleave_nid(&nodes, ilx);
		return folio_alloc_gigantic(order, gfp, nid, &allowed);
	case MPOL_BIND:
		return folio_alloc_gigantic(order, gfp, nid, &nodes);
	default:
		folio = folio_alloc_gigantic(order, gfp, nid, &nodes);
		if (!folio)
			folio = folio_alloc_gigantic(order, gfp, nid, &allowed);
		return folio;
	}
}
#else
static struct folio *kvm_gmem_alloc_gigantic(gfp_t gfp, int order,
					     struct mempolicy *mpol, pgoff_t ilx)
{
	return folio_alloc_gigantic(order, gfp, numa_node_id(), NULL);
}
#endif /* CONFIG_NUMA */
#else
static struct folio *kvm_gmem_alloc_gigantic(gfp_t gfp, int order,
					     struct mempolicy *mpol, pgoff_t ilx)
{
	return NULL;
}
#endif /* CONFIG_CONTIG_ALLOC */

static struct folio *kvm_gmem_alloc_folio(struct inode *inode, pgoff_t index,
					  int order, bool has_fallback)
{
	gfp_t gfp = mapping_gfp_mask(inode->i_mapping);
	struct mempolicy *mpol;
	struct folio *folio;
	pgoff_t ilx;

	mpol = kvm_gmem_get_mpol(inode, index, &ilx);
	ilx += index >> order;

	if (order == GMEM_ORDER_1G) {
		/* This allocator does not know NORETRY, but doesn't insist either. */
		gfp |= __GFP_COMP | __GFP_NOWARN;
		folio = kvm_gmem_alloc_gigantic(gfp, order, mpol, ilx);
		if (folio)
			folio_set_large_rmappable(folio);
	} else {
		/* It's worth some effort, but nobody must be killed for it. */
		if (has_fallback)
			gfp |= __GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC;

		if (mpol)
			folio = folio_alloc_mpol(gfp, order, mpol, ilx,
						 numa_node_id());
		else
			folio = folio_alloc(gfp, order);
	}

	mpol_cond_put(mpol);
	return folio;
}

#ifndef kvm_arch_gmem_clear
static bool kvm_arch_gmem_clear(void *addr, size_t len)
{
	return false;
}
#endif

static void kvm_gmem_clear(void *addr, size_t len)
{
	if (kvm_arch_gmem_clear(addr, len))
		return;

	for (; len; len -= PAGE_SIZE, addr += PAGE_SIZE)
		clear_page(addr);
}

/* How much to zero at once, takes some ten microseconds. */
#define GMEM_ZERO_CHUNK		SZ_128K

static void kvm_gmem_zero_folio(struct folio *folio, long first, long nr)
{
	void *addr = folio_address(folio) + first * PAGE_SIZE;
	size_t len, left = nr * PAGE_SIZE;

	BUILD_BUG_ON(IS_ENABLED(CONFIG_HIGHMEM));

	for (; left; left -= len, addr += len) {
		len = min_t(size_t, left, GMEM_ZERO_CHUNK);
		kvm_gmem_clear(addr, len);
		cond_resched();
	}
}

/*
 * Finding out that there's no contiguous memory takes a fraction of a second.
 * Once that has happened, leave the file alone for a while, and for longer if it
 * happens again.
 */
#define GMEM_MAX_BACKOFF_SHIFT	6

static bool kvm_gmem_gigantic_backs_off(struct kvm_gmem_inode *gi)
{
	return gi->gigantic_failures && time_before(jiffies, gi->gigantic_retry);
}

static void kvm_gmem_update_gigantic_backoff(struct kvm_gmem_inode *gi, bool success)
{
	if (success) {
		gi->gigantic_failures = 0;
		return;
	}

	gi->gigantic_failures = min(gi->gigantic_failures + 1, GMEM_MAX_BACKOFF_SHIFT);
	gi->gigantic_retry = jiffies + (HZ << gi->gigantic_failures);
}

/*
 * A folio of this order may be added at @index if the file permits it and the
 * naturally aligned range is inside of the file, has nothing in it yet and no
 * more than one NUMA policy.
 */
static bool kvm_gmem_order_fits(struct inode *inode, pgoff_t index, int order)
{
	unsigned long start = round_down(index, 1UL << order);
	unsigned long last = start + (1UL << order) - 1;

	if (!kvm_gmem_may_have_order(inode, order))
		return false;

	if (!order)
		return true;

	return last < i_size_read(inode) >> PAGE_SHIFT &&
	       kvm_gmem_has_one_policy(inode, start, last) &&
	       !xa_find(&inode->i_mapping->i_pages, &start, last, XA_PRESENT);
}

static struct folio *kvm_gmem_add_folio_order(struct inode *inode, pgoff_t index,
					      int order)
{
	struct address_space *mapping = inode->i_mapping;
	gfp_t gfp = mapping_gfp_mask(mapping);
	struct folio *folio;
	int r;

	index = round_down(index, 1UL << order);

	/* What's left if there's no memory even for a page is an error. */
	folio = kvm_gmem_alloc_folio(inode, index, order, order > 0);
	if (!folio)
		return ERR_PTR(-ENOMEM);

	/* Don't have the memcg kill someone for the sake of a bigger folio. */
	if (order)
		gfp |= __GFP_NORETRY | __GFP_NOWARN;

	/* On success, returns with the folio locked. */
	r = filemap_add_folio(mapping, folio, index, gfp);
	if (r) {
		folio_put(folio);
		return ERR_PTR(r);
	}

	return folio;
}

/*
 * One at a time: who finds the memory that somebody else is about to allocate busy
 * would take smaller folios where there's going to be a big one, and take it for a
 * failure.
 */
static struct folio *kvm_gmem_add_gigantic_folio(struct inode *inode, pgoff_t index,
						 bool populate)
{
	struct kvm_gmem_inode *gi = GMEM_I(inode);
	struct folio *folio;

	guard(mutex)(&gi->gigantic_lock);

	/* Whoever held the lock may have added just that. */
	if (!kvm_gmem_order_fits(inode, index, GMEM_ORDER_1G))
		return ERR_PTR(-EEXIST);

	/* Populating is what's done ahead, i.e. it has the time to try. */
	if (!populate && kvm_gmem_gigantic_backs_off(gi))
		return ERR_PTR(-ENOMEM);

	folio = kvm_gmem_add_folio_order(inode, index, GMEM_ORDER_1G);
	if (PTR_ERR_OR_ZERO(folio) != -EEXIST)
		kvm_gmem_update_gigantic_backoff(gi, !IS_ERR(folio));

	return folio;
}

static struct folio *kvm_gmem_add_folio(struct inode *inode, pgoff_t index,
					bool populate)
{
	struct folio *folio = ERR_PTR(-ENOMEM);
	int i, order, asked = -1;

	for (i = 0; i < ARRAY_SIZE(kvm_gmem_orders); i++) {
		order = kvm_gmem_orders[i];

		if (!kvm_gmem_order_fits(inode, index, order))
			continue;

		asked = max(asked, order);

		if (order == GMEM_ORDER_1G)
			folio = kvm_gmem_add_gigantic_folio(inode, index, populate);
		else
			folio = kvm_gmem_add_folio_order(inode, index, order);
		if (!IS_ERR(folio) || PTR_ERR(folio) == -EEXIST)
			break;
	}

	trace_guest_memfd_allocate(inode, index, asked,
				   IS_ERR(folio) ? PTR_ERR(folio) : order);
	if (IS_ERR(folio))
		return folio;

	/* With init_on_alloc=1 or init_on_free=1 the allocator has done it. */
	if (!want_init_on_alloc(mapping_gfp_mask(inode->i_mapping)) &&
	    !want_init_on_free())
		kvm_gmem_zero_folio(folio, 0, folio_nr_pages(folio));
	if (kvm_gmem_is_shared(inode))
		folio_mark_uptodate(folio);
	return folio;
}

/*
 * Return the folio at @index, locked and with a reference, and allocate it if
 * there is none.  Whoever adds a folio to the file zeroes it before unlocking
 * it for the first time, i.e. a locked folio never holds stale data.
 *
 * The folio is up-to-date if it's ready to be mapped.  Shared memory needs no
 * preparation beyond zeroing, for private memory see kvm_gmem_prepare_folio().
 * There is no backing storage for the memory, so the folio remains up-to-date
 * until it's removed.
 *
 * Ignore accessed, referenced, and dirty flags.  The memory is unevictable and
 * there is no storage to write back to.
 */
struct folio *kvm_gmem_get_folio(struct inode *inode, pgoff_t index, bool populate)
{
	struct address_space *mapping = inode->i_mapping;
	struct folio *folio;

	lockdep_assert_held(&mapping->invalidate_lock);

	do {
		folio = filemap_lock_folio(mapping, index);
		if (IS_ERR(folio))
			folio = kvm_gmem_add_folio(inode, index, populate);
	} while (PTR_ERR_OR_ZERO(folio) == -EEXIST);

	return folio;
}

/*
 * mm/ calls this before it splits, reclaims or otherwise evicts a folio, which
 * it must not.  The one exception is the folio that's being split below.
 *
 * As it happens, this is also the only thing that is called if a page of a large
 * folio is poisoned, namely when memory_failure() tries to split the folio, and
 * gives up on it if that fails.  Keep the folio in one piece and get rid of what
 * maps the bad page, the rest is mapped in smaller pieces from now on.
 */
bool kvm_gmem_release_folio(struct folio *folio, gfp_t gfp)
{
	struct address_space *mapping = folio->mapping;
	struct inode *inode = mapping->host;

	if (READ_ONCE(GMEM_I(inode)->split_folio) == folio)
		return true;

	if (folio_test_large(folio) && folio_test_has_hwpoisoned(folio)) {
		WRITE_ONCE(GMEM_I(inode)->has_poison, true);
		kvm_gmem_handle_poison(inode, folio->index,
				       folio_next_index(folio));
		unmap_mapping_pages(mapping, folio->index,
				    folio_nr_pages(folio), false);
	}

	return false;
}

/*
 * Split a 2 MiB folio into pages.  Fails if the folio has references other than
 * that of the caller, e.g. is pinned.  A fault or a memory error in flight has
 * one as well, but not for long.
 */
static int kvm_gmem_split_folio(struct inode *inode, struct folio *folio)
{
	struct kvm_gmem_inode *gi = GMEM_I(inode);
	int order = folio_order(folio);
	pgoff_t index = folio->index;
	int i, r = -EINVAL;

	lockdep_assert_held_write(&inode->i_mapping->invalidate_lock);

	/* The page cache cannot split what spans more than two of its levels. */
	if (order != GMEM_ORDER_2M)
		goto out;

	WRITE_ONCE(gi->split_folio, folio);
	for (i = 0; i < GMEM_PATIENCE; i++) {
		r = split_huge_page(&folio->page);
		if (!r)
			break;

		usleep_range(50, 100);
	}
	WRITE_ONCE(gi->split_folio, NULL);
out:
	trace_guest_memfd_split(inode, index, order, r);
	return r;
}

/*
 * Copy a page that may be bad.  What was lost is remembered by the copy, which is
 * healthy, but must not be taken for what was there.  The allocator puts it aside
 * once it's freed.
 */
static void kvm_gmem_copy_page(struct folio *folio, long i, struct page *from)
{
	struct page *to = folio_page(folio, i);

	if (!PageHWPoison(from) && !copy_mc_highpage(to, from))
		return;

	clear_highpage(to);
	SetPageHWPoison(to);
	if (folio_test_large(folio))
		folio_set_has_hwpoisoned(folio);
}

/* The copies have not made it into the file. */
static void kvm_gmem_drop_copies(struct list_head *folios)
{
	struct folio *folio, *next;
	long i;

	list_for_each_entry_safe(folio, next, folios, lru) {
		list_del(&folio->lru);
		for (i = 0; i < folio_nr_pages(folio); i++)
			ClearPageHWPoison(folio_page(folio, i));
		if (folio_test_large(folio))
			folio_clear_has_hwpoisoned(folio);
		folio_put(folio);
	}
}

/* A look-up or a memory error in flight has a reference, but not for long. */
static bool kvm_gmem_is_pinned(struct folio *folio)
{
	int i;

	for (i = 0; i < GMEM_PATIENCE; i++) {
		/* The page cache's, and the caller's. */
		if (folio_ref_count(folio) == folio_nr_pages(folio) + 1)
			return false;

		usleep_range(50, 100);
	}

	return true;
}

/*
 * Replace a folio that cannot be split by smaller ones with the same contents,
 * but for poisoned pages in [start, end), which become pages of zeros.  Needs as
 * much free memory as the folio has.  Fails if the folio is pinned, as whoever
 * pinned it would be left with memory that is no longer the file's.
 */
static int kvm_gmem_replace_folio(struct inode *inode, struct folio *old,
				  pgoff_t start, pgoff_t end)
{
	struct address_space *mapping = inode->i_mapping;
	pgoff_t index = old->index, next_index = folio_next_index(old);
	struct folio *folio, *next;
	LIST_HEAD(folios);
	int r = -ENOMEM;

	lockdep_assert_held_write(&mapping->invalidate_lock);

	unmap_mapping_pages(mapping, index, next_index - index, false);

	if (kvm_gmem_is_pinned(old))
		return -EBUSY;

	while (index < next_index) {
		int order = 0;
		long i;

		/* Once that failed, there are pages up to the next 2 MiB. */
		if (kvm_gmem_may_have_order(inode, GMEM_ORDER_2M) &&
		    IS_ALIGNED(index, 1UL << GMEM_ORDER_2M))
			order = GMEM_ORDER_2M;

		folio = kvm_gmem_alloc_folio(inode, index, order, true);
		if (!folio && order)
			folio = kvm_gmem_alloc_folio(inode, index, 0, true);
		trace_guest_memfd_allocate(inode, index, order,
					   folio ? folio_order(folio) : -ENOMEM);
		if (!folio)
			goto out;

		list_add_tail(&folio->lru, &folios);

		for (i = 0; i < folio_nr_pages(folio); i++, index++) {
			struct page *page = folio_file_page(old, index);

			if (index >= start && index < end)
				clear_highpage(folio_page(folio, i));
			else
				kvm_gmem_copy_page(folio, i, page);
			cond_resched();
		}
	}

	/* This removes the references of the page cache, see ->free_folio. */
	index = old->index;
	filemap_remove_folio(old);

	list_for_each_entry_safe(folio, next, &folios, lru) {
		list_del(&folio->lru);

		/*
		 * There's no way back, and it takes a handful of xarray nodes.
		 * Charges beyond the limit are forced, nobody is killed.
		 */
		if (WARN_ON_ONCE(filemap_add_folio(mapping, folio, index,
						   mapping_gfp_mask(mapping) |
						   __GFP_NORETRY | __GFP_NOFAIL))) {
			index = folio_next_index(folio);
			folio_put(folio);
			continue;
		}
		if (folio_test_uptodate(old))
			folio_mark_uptodate(folio);
		index = folio_next_index(folio);
		folio_unlock(folio);
		folio_put(folio);
	}
	r = 0;
out:
	kvm_gmem_drop_copies(&folios);
	return r;
}

/*
 * Make sure that removing [start, end) does not affect what's outside of it, for
 * a @folio that is only partially inside.  Returns 1 if the folio still is in one
 * piece, but the part inside reads as zeros, -EAGAIN if there's another folio.
 */
static int kvm_gmem_punch_partial_folio(struct inode *inode, struct folio *folio,
					pgoff_t start, pgoff_t end)
{
	pgoff_t index = max(start, folio->index);
	long nr = min(end, folio_next_index(folio)) - index;

	if (!kvm_gmem_split_folio(inode, folio))
		return 0;

	/* Poison is not healed by writing zeros to it. */
	if (kvm_gmem_range_is_poisoned(folio, index, nr)) {
		if (folio_order(folio) != GMEM_ORDER_1G)
			return -EBUSY;

		return kvm_gmem_replace_folio(inode, folio, start, end) ?: -EAGAIN;
	}

	/* The folio remains, as memory of the file that happens to be zero. */
	kvm_gmem_zero_folio(folio, index - folio->index, nr);
	return 1;
}

/*
 * Poison must not go back to the page allocator as a part of a large folio.  Page
 * by page it's kept from that by the allocator itself.
 */
static void kvm_gmem_split_poisoned(struct inode *inode, pgoff_t start, pgoff_t end)
{
	struct address_space *mapping = inode->i_mapping;
	struct folio_batch fbatch;
	int i;

	if (!READ_ONCE(GMEM_I(inode)->has_poison))
		return;

	folio_batch_init(&fbatch);
	while (filemap_get_folios(mapping, &start, end - 1, &fbatch)) {
		for (i = 0; i < folio_batch_count(&fbatch); i++) {
			struct folio *folio = fbatch.folios[i];

			if (!folio_test_large(folio) ||
			    !folio_test_has_hwpoisoned(folio))
				continue;

			folio_lock(folio);
			kvm_gmem_split_folio(inode, folio);
			folio_unlock(folio);
		}
		folio_batch_release(&fbatch);
		cond_resched();
	}
}

/*
 * Remove [start, end) from the file: on success, the range reads as zeros and
 * everything outside of it is unchanged.  Memory is freed as far as folios are
 * inside of the range or can be split at its ends.
 *
 * EBUSY means that there's poison in the range that can't be gotten rid of as the
 * folio around it is pinned, ENOMEM the same for lack of memory.
 */
int kvm_gmem_remove_range(struct inode *inode, pgoff_t start, pgoff_t end)
{
	struct address_space *mapping = inode->i_mapping;
	pgoff_t edge[] = { start, end - 1 };
	int i, r;

	lockdep_assert_held_write(&mapping->invalidate_lock);

	for (i = 0; i < ARRAY_SIZE(edge) && start < end; i++) {
		struct folio *folio = filemap_lock_folio(mapping, edge[i]);
		pgoff_t first, next;

		if (IS_ERR(folio))
			continue;

		first = folio->index;
		next = folio_next_index(folio);
		r = 0;
		if (first < start || next > end)
			r = kvm_gmem_punch_partial_folio(inode, folio, start, end);

		folio_unlock(folio);
		folio_put(folio);

		if (r == -EAGAIN) {
			i--;
			continue;
		}
		if (r < 0)
			return r;

		/* Leave out what's still in one piece. */
		if (r && first < start)
			start = min(next, end);
		if (r && next > end)
			end = max(first, start);
	}

	if (start >= end)
		return 0;

	kvm_gmem_split_poisoned(inode, start, end);
	truncate_inode_pages_range(mapping, (loff_t)start << PAGE_SHIFT,
				   ((loff_t)end << PAGE_SHIFT) - 1);
	return 0;
}

/* The last user of the file is gone. */
void kvm_gmem_evict_inode(struct inode *inode)
{
	if (READ_ONCE(GMEM_I(inode)->has_poison)) {
		filemap_invalidate_lock(inode->i_mapping);
		kvm_gmem_split_poisoned(inode, 0, ULONG_MAX);
		filemap_invalidate_unlock(inode->i_mapping);
	}

	truncate_inode_pages_final(&inode->i_data);
	clear_inode(inode);
}

/*
 * The folio has been removed from the file and its last reference is about to be
 * dropped.  Large folios that have poison in them and that could not be split are
 * lost for good, all of them.
 */
void kvm_gmem_retain_poison(struct folio *folio)
{
	if (folio_test_large(folio) && folio_test_has_hwpoisoned(folio)) {
		folio_get(folio);
		folio_abandon(folio);
	}
}

static void kvm_gmem_count_bytes(struct address_space *mapping, u64 *bytes)
{
	XA_STATE(xas, &mapping->i_pages, 0);
	struct folio *folio;
	int i;

	rcu_read_lock();
	xas_for_each(&xas, folio, ULONG_MAX) {
		int order;

		if (xas_retry(&xas, folio) || xa_is_value(folio))
			continue;

		/* The entry's order is stable, that of an unlocked folio isn't. */
		order = xas_get_order(&xas);
		for (i = 0; order < kvm_gmem_orders[i]; i++)
			;
		bytes[i] += PAGE_SIZE << order;

		if (need_resched()) {
			xas_pause(&xas);
			cond_resched_rcu();
		}
	}
	rcu_read_unlock();
}

/*
 * What the file holds is counted when somebody asks, as the page cache is the
 * only place that is always right.  All numbers but the flags are in bytes.
 */
void kvm_gmem_show_fdinfo(struct seq_file *m, struct file *file)
{
	u64 bytes[ARRAY_SIZE(kvm_gmem_orders)] = {};
	struct inode *inode = file_inode(file);

	kvm_gmem_count_bytes(inode->i_mapping, bytes);

	seq_printf(m, "gmem_flags:\t0x%llx\n", GMEM_I(inode)->flags);
	seq_printf(m, "gmem_size:\t%lld\n", i_size_read(inode));
	seq_printf(m, "gmem_4k:\t%llu\n", bytes[2]);
	seq_printf(m, "gmem_2m:\t%llu\n", bytes[1]);
	seq_printf(m, "gmem_1g:\t%llu\n", bytes[0]);
}
