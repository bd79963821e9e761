/*
 * Have TCG stop all other CPUs, again and again, as it does for an atomic access that isn't aligned.  To real CPUs it's nothing
 * special.
 *
 * usage: stop_other_cpus PAUSE
 *   PAUSE   how many rounds of an empty loop to wait in between; 20000 is less than a millisecond
 */
#include <err.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/prctl.h>

static _Alignas(64) unsigned char memory[64];

int main(int argc, char **argv)
{
	uint32_t *odd = (uint32_t *)(memory + 1);
	long pause, i;

	if (argc != 2 || (pause = atol(argv[1])) <= 0)
		errx(1, "usage: stop_other_cpus PAUSE");
	/* Don't outlive the test. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;) {
		for (i = 0; i < pause; i++)
			asm volatile("");
		asm volatile("lock incl %0" : "+m" (*odd));
	}
}
