/* SPDX-License-Identifier: GPL-2.0-only */
/* Count how often a function in KVM is called for a range of gfns. */
#ifndef SELFTEST_KVM_GFN_PROBE_H
#define SELFTEST_KVM_GFN_PROBE_H

#include <stdbool.h>
#include <stdint.h>

struct gfn_probe {
	const char *function;
	/* The number of the argument that is the gfn, from 1. */
	int arg;
	bool installed;
	/* As of the last read. */
	uint64_t total;
};

/* Returns NULL, or the reason why the probe cannot be used. */
const char *gfn_probe_install(struct gfn_probe *probe, uint64_t first_gfn,
			      uint64_t last_gfn);
/* The number of calls since the probe was installed or last read. */
uint64_t gfn_probe_read(struct gfn_probe *probe);
void gfn_probe_remove(struct gfn_probe *probe);

#endif /* SELFTEST_KVM_GFN_PROBE_H */
