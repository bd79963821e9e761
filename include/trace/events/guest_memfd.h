/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM guest_memfd

#if !defined(_TRACE_GUEST_MEMFD_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_GUEST_MEMFD_H

#include <linux/tracepoint.h>

/*
 * All events name the file by its inode number, as in fstat(), and count in
 * pages: index is a page of the file, order is log2 of a number of pages.
 */

/*
 * A folio was added to the file, or couldn't be if got is negative, i.e. -errno.
 * asked is the biggest order that the file's flags and what it holds already
 * allow for.  The folio begins at index rounded down to a multiple of its size.
 * -EEXIST means that somebody else was faster, and is no failure.
 */
TRACE_EVENT(guest_memfd_allocate,
	TP_PROTO(struct inode *inode, pgoff_t index, int asked, int got),
	TP_ARGS(inode, index, asked, got),

	TP_STRUCT__entry(
		__field(unsigned long, ino)
		__field(pgoff_t, index)
		__field(int, asked)
		__field(int, got)
	),

	TP_fast_assign(
		__entry->ino	= inode->i_ino;
		__entry->index	= index;
		__entry->asked	= asked;
		__entry->got	= got;
	),

	TP_printk("ino %lu index 0x%lx asked order %d got %d",
		  __entry->ino, __entry->index, __entry->asked, __entry->got)
);

/*
 * A folio was split into pages, or couldn't be if ret is negative, i.e. -errno.
 * One of 1 GiB never can: a hole in it becomes zeros, or the folio is replaced by
 * smaller ones, for which guest_memfd_allocate tells their sizes.
 */
TRACE_EVENT(guest_memfd_split,
	TP_PROTO(struct inode *inode, pgoff_t index, int order, int ret),
	TP_ARGS(inode, index, order, ret),

	TP_STRUCT__entry(
		__field(unsigned long, ino)
		__field(pgoff_t, index)
		__field(int, order)
		__field(int, ret)
	),

	TP_fast_assign(
		__entry->ino	= inode->i_ino;
		__entry->index	= index;
		__entry->order	= order;
		__entry->ret	= ret;
	),

	TP_printk("ino %lu index 0x%lx order %d ret %d",
		  __entry->ino, __entry->index, __entry->order, __entry->ret)
);

/* All guest mappings of [start, end) are about to be zapped. */
TRACE_EVENT(guest_memfd_invalidate,
	TP_PROTO(struct inode *inode, pgoff_t start, pgoff_t end),
	TP_ARGS(inode, start, end),

	TP_STRUCT__entry(
		__field(unsigned long, ino)
		__field(pgoff_t, start)
		__field(pgoff_t, end)
	),

	TP_fast_assign(
		__entry->ino	= inode->i_ino;
		__entry->start	= start;
		__entry->end	= end;
	),

	TP_printk("ino %lu range 0x%lx-0x%lx",
		  __entry->ino, __entry->start, __entry->end)
);

#endif /* _TRACE_GUEST_MEMFD_H */

#include <trace/define_trace.h>
