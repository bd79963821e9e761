/*
 * For LD_PRELOAD: KVM says that it cannot log dirty pages of a guest_memfd, as before it could.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>

#define KVM_CHECK_EXTENSION 0xae03
#define KVM_CAP_GUEST_MEMFD_SLOTS 0x474d01
#define KVM_GUEST_MEMFD_SLOTS_LOG_DIRTY (1 << 2)

int ioctl(int fd, unsigned long request, ...)
{
	int (*real)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
	va_list arguments;
	int result;
	long argument;

	va_start(arguments, request);
	argument = va_arg(arguments, long);
	va_end(arguments);

	result = real(fd, request, argument);
	if (request == KVM_CHECK_EXTENSION && argument == KVM_CAP_GUEST_MEMFD_SLOTS && result > 0)
		result &= ~KVM_GUEST_MEMFD_SLOTS_LOG_DIRTY;
	return result;
}
