/*
 * For L2: say where in physical memory a page is, wait for a line on stdin, and say what it is like to read the page.
 *
 * Each line is about another page.  Ends with the end of input.
 */
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
/* A huge page, if possible. */
#define SIZE (2UL << 20)

static sigjmp_buf back;
static volatile int code;

static void sigbus(int signal, siginfo_t *info, void *context)
{
	code = info->si_code;
	siglongjmp(back, 1);
}

static uint64_t physical(void *address)
{
	int file = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry = 0;

	if (pread(file, &entry, sizeof(entry), (uintptr_t)address / PAGE * sizeof(entry)) != sizeof(entry))
		return 0;
	close(file);
	return (entry & ((1UL << 55) - 1)) * PAGE;
}

int main(void)
{
	struct sigaction action = { .sa_sigaction = sigbus, .sa_flags = SA_SIGINFO };
	char line[16];

	setlinebuf(stdout);
	sigaction(SIGBUS, &action, NULL);
	do {
		char *memory = mmap(NULL, 2 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		volatile char *page;

		memory = (char *)(((uintptr_t)memory + SIZE - 1) / SIZE * SIZE);
		madvise(memory, SIZE, MADV_HUGEPAGE);
		memset(memory, 'x', SIZE);
		page = memory + 5 * PAGE;
		printf("l2: page at %#lx\n", physical((void *)page));
		if (!fgets(line, sizeof(line), stdin))
			break;
		if (sigsetjmp(back, 1))
			printf("l2: SIGBUS, code %d\n", code);
		else
			printf("l2: read %c\n", *page);
		/* Its neighbours are fine. */
		printf("l2: next to it: %c %c\n", page[-1], page[PAGE]);
	} while (1);
	return 0;
}
