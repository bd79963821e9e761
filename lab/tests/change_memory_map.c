/*
 * One CPU turns the decoding of a PCI device's memory off and on, which changes the machine's memory map; another one takes
 * timer interrupts meanwhile, each of which ends with a write to its local APIC.  A write that gets lost is the CPU's last timer
 * interrupt.
 *
 * usage: change_memory_map CONFIG SECONDS
 *   CONFIG   the file in sysfs with the configuration space of a device that nobody uses
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define PCI_COMMAND		4
#define PCI_COMMAND_MEMORY	2

static void run_on(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "CPU %d", cpu);
}

/* In seconds.  Not by CLOCK_MONOTONIC: if reads get lost as well, that's anybody's guess. */
static uint64_t cpu_time(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
	return ts.tv_sec;
}

static void change_map(int fd, uint16_t command)
{
	for (int i = 0; i < 2; i++) {
		command ^= PCI_COMMAND_MEMORY;
		if (pwrite(fd, &command, sizeof(command), PCI_COMMAND) != sizeof(command))
			err(1, "command register");
	}
}

int main(int argc, char *argv[])
{
	volatile unsigned long *naps = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int fd = argc == 3 ? open(argv[1], O_RDWR) : -1;
	unsigned long changes = 0;
	uint16_t command;
	uint64_t start;
	pid_t pid;

	if (fd < 0 || naps == MAP_FAILED || pread(fd, &command, sizeof(command), PCI_COMMAND) != sizeof(command))
		err(1, "%s", argv[1]);

	for (int cpu = 0; cpu < 2; cpu++) {
		unsigned long last = *naps;

		pid = fork();
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			run_on(cpu);
			for (;; ++*naps)
				usleep(100);
		}

		run_on(!cpu);
		for (start = cpu_time(); cpu_time() - start < strtoul(argv[2], NULL, 10);) {
			last = *naps;
			for (int i = 0; i < 2000; i++, changes += 2)
				change_map(fd, command);
			if (*naps == last)
				errx(1, "CPU %d takes no timer interrupts any more, after %lu changes of the memory map",
				     cpu, changes);
		}
		kill(pid, SIGKILL);
	}
	printf("%lu timers, %lu changes of the memory map\n", *naps, changes);
	return 0;
}
