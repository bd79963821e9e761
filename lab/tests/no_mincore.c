/*
 * For LD_PRELOAD: mincore() that reports no page.  The kernel does so for the pages of a guest_memfd while it puts others in the
 * place of a folio of 1 GiB that has a bad page.
 */
#include <stddef.h>
#include <string.h>

int mincore(void *start, size_t length, unsigned char *pages)
{
	(void)start;
	memset(pages, 0, (length + 4095) / 4096);
	return 0;
}
