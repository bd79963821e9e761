/*
 * For LD_PRELOAD: QEMU's mappings of a guest_memfd are 4 KiB off a 2 MiB boundary, wherever QEMU wants them to be.
 *
 * QEMU reserves address space, maps the file over a part of it, and unmaps the rest, all of it by way of what mmap() returned.
 * So return another place, in the middle of a reservation that is large enough for QEMU to unmap around it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE (2UL << 20)

static int is_guest_memfd(int fd)
{
	char link[32], path[64];
	ssize_t length;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	length = readlink(link, path, sizeof(path) - 1);
	if (length < 0)
		return 0;
	path[length] = 0;
	return strstr(path, "[kvm-gmem]") != NULL;
}

void *mmap64(void *address, size_t size, int protection, int flags, int fd, off_t offset)
{
	void *(*map)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap64");
	uintptr_t reserved;

	if (fd < 0 || !(flags & MAP_FIXED) || !is_guest_memfd(fd))
		return map(address, size, protection, flags, fd, offset);

	reserved = (uintptr_t)map(NULL, size + 4 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (reserved == (uintptr_t)MAP_FAILED)
		return MAP_FAILED;
	reserved = (reserved + HUGE - 1) / HUGE * HUGE + 4096;
	return map((void *)reserved, size, protection, flags, fd, offset);
}
