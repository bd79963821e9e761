/*
 * For LD_PRELOAD: KVM_CHECK_EXTENSION(KVM_CAP_GUEST_MEMFD_SLOTS) without the bits that are in $HIDE_SLOTS, as on a kernel that
 * lacks what they stand for.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdlib.h>

#define KVM_CHECK_EXTENSION 0xae03
#define KVM_CAP_GUEST_MEMFD_SLOTS 0x474d01

int ioctl(int fd, unsigned long request, ...)
{
	int (*real)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
	const char *hidden = getenv("HIDE_SLOTS");
	va_list arguments;
	int result;
	long argument;

	va_start(arguments, request);
	argument = va_arg(arguments, long);
	va_end(arguments);

	result = real(fd, request, argument);
	if (request == KVM_CHECK_EXTENSION && argument == KVM_CAP_GUEST_MEMFD_SLOTS && result > 0)
		result &= ~strtol(hidden ? hidden : "0", NULL, 0);
	return result;
}
