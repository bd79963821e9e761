/*
 * A workload for L2 that knows what every word of its memory must be.
 *
 * usage: verify_memory MIB [ROUNDS]
 *
 * One process per CPU fills its share of MIB, and then goes over it again and again: each page must have what was last
 * written to it, and one in eight is written anew.  It says "l2: round N" when all of them are through round N, and
 * ends after ROUNDS, or when there is something to be read from stdin, with a last round that only reads.  A wrong word
 * makes it fail.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / sizeof(uint64_t))

#define MAX_CPUS 64

static struct {
	volatile int stop;
	/* How many rounds each process is through, and what has been said of that. */
	long through[MAX_CPUS], said;
} *shared;

static uint64_t value(uint64_t page, uint64_t generation, uint64_t word)
{
	uint64_t v = (page << 32) ^ (generation << 9) ^ word;

	/* Zeros are never right. */
	return v * 0x9e3779b97f4a7c15ULL | 1;
}

static void write_page(uint64_t *memory, uint64_t page, uint64_t generation)
{
	for (uint64_t word = 0; word < WORDS; word++)
		memory[page * WORDS + word] = value(page, generation, word);
}

static void check_page(uint64_t *memory, uint64_t page, uint64_t generation, long round)
{
	for (uint64_t word = 0; word < WORDS; word++) {
		uint64_t is = memory[page * WORDS + word], wanted = value(page, generation, word);

		if (is != wanted) {
			printf("l2: FAILED: round %ld, page %lu at %p, word %lu is %016lx instead of %016lx\n", round, page,
			       &memory[page * WORDS], word, is, wanted);
			exit(1);
		}
	}
}

/* Whoever is last says so. */
static void end_round(int cpu, int cpus, long round)
{
	long all = round, said, through;

	__atomic_store_n(&shared->through[cpu], round, __ATOMIC_SEQ_CST);
	for (int i = 0; i < cpus; i++) {
		through = __atomic_load_n(&shared->through[i], __ATOMIC_SEQ_CST);
		all = through < all ? through : all;
	}
	said = __atomic_load_n(&shared->said, __ATOMIC_SEQ_CST);
	while (said < all) {
		if (__atomic_compare_exchange_n(&shared->said, &said, all, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
			printf("l2: round %ld\n", all);
	}
}

static void work(int cpu, int cpus, unsigned long mib, long rounds)
{
	uint64_t pages = (mib << 20) / PAGE / cpus, random = 88172645463325252ULL + cpu;
	uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint32_t *generation = calloc(pages, sizeof(*generation));
	cpu_set_t set;

	if (memory == MAP_FAILED || !generation) {
		printf("l2: FAILED: no memory for %lu MiB\n", mib);
		exit(1);
	}
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);

	for (uint64_t page = 0; page < pages; page++)
		write_page(memory, page, 0);
	for (long round = 1; !shared->stop && round <= rounds; round++) {
		for (uint64_t page = 0; page < pages && !shared->stop; page++) {
			check_page(memory, page, generation[page], round);
			random ^= random << 13;
			random ^= random >> 7;
			random ^= random << 17;
			if (random % 8 == 0)
				write_page(memory, page, ++generation[page]);
		}
		if (!shared->stop)
			end_round(cpu, cpus, round);
	}
	for (uint64_t page = 0; page < pages; page++)
		check_page(memory, page, generation[page], -1);
	exit(0);
}

int main(int argc, char **argv)
{
	int cpus = sysconf(_SC_NPROCESSORS_ONLN), left, failed = 0, status;
	struct pollfd input = { .fd = 0, .events = POLLIN };
	unsigned long mib = argc > 1 ? strtoul(argv[1], NULL, 0) : 0;
	long rounds = argc > 2 ? strtol(argv[2], NULL, 0) : 1L << 40;

	cpus = cpus < MAX_CPUS ? cpus : MAX_CPUS;
	left = cpus;
	setlinebuf(stdout);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (!mib || shared == MAP_FAILED) {
		printf("l2: FAILED: usage: verify_memory MIB [ROUNDS]\n");
		return 1;
	}
	for (int cpu = 0; cpu < cpus; cpu++) {
		if (!fork())
			work(cpu, cpus, mib, rounds);
	}
	while (left) {
		if (rounds == 1L << 40 && poll(&input, 1, 200) > 0)
			shared->stop = 1;
		while (left && waitpid(-1, &status, rounds == 1L << 40 && !shared->stop ? WNOHANG : 0) > 0) {
			left--;
			failed |= status;
		}
	}
	return failed ? 1 : 0;
}
