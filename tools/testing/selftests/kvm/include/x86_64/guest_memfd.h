/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Look at guest_memfd memory from both sides: from the VMM, and from a guest
 * that does what the test tells it to.
 */
#ifndef SELFTEST_KVM_GUEST_MEMFD_H
#define SELFTEST_KVM_GUEST_MEMFD_H

#include "kvm_util.h"

#define GMEM_MAX_VCPUS	4

enum gmem_op {
	/* word = val */
	GMEM_SET,
	/* word += val, with one locked access per word. */
	GMEM_ADD,
	/* Is word == val? */
	GMEM_CHECK,
	/*
	 * word = val, then read it back.  Other threads may take the memory
	 * away, i.e. zero is fine, too, and so is any value with the same upper
	 * half, i.e. one that was written earlier.
	 */
	GMEM_SET_CHECK,
};

/*
 * What a vCPU does to @nr words that are @stride bytes apart.  The value goes up
 * by @step from word to word.  A check that fails ends the work.
 */
struct gmem_work {
	uint64_t op;
	uint64_t gva;
	uint64_t nr;
	uint64_t stride;
	uint64_t val;
	uint64_t step;

	/* Words done so far, and the first value that was not as expected. */
	uint64_t done;
	uint64_t bad;
	uint64_t failed;
};

/* The tag of a page, any two pages of a test are different. */
#define GMEM_TAG_STEP	(1ULL << 32)
#define gmem_tag(page)	(((page) + 1) * GMEM_TAG_STEP)

void gmem_do_work(struct gmem_work *work);
void gmem_guest_code(uint64_t vcpu_id);
struct gmem_work *gmem_vcpu_work(struct kvm_vcpu *vcpu);
int __gmem_vcpu_run(struct kvm_vcpu *vcpu, const struct gmem_work *work);
void gmem_vcpu_run(struct kvm_vcpu *vcpu, const struct gmem_work *work);
void gmem_vcpu_reset(struct kvm_vcpu *vcpu, struct kvm_regs *regs);

/* KVM_PRE_FAULT_MEMORY, which has to map all of it. */
void gmem_pre_fault(struct kvm_vcpu *vcpu, uint64_t gpa, uint64_t size);
/* The statistic @name of a vCPU, e.g. "pf_taken". */
uint64_t gmem_vcpu_stat(struct kvm_vcpu *vcpu, const char *name);

void gmem_map_in_guest(struct kvm_vm *vm, uint64_t gpa, uint64_t size, int level);
void *gmem_mmap(int fd, size_t size, off_t offset);
int gmem_sigbus_code(void *mem, bool write);
int gmem_inject_memory_error(void *mem);
uint64_t gmem_fdinfo(int fd, const char *key);
void gmem_stop_numa_balancing(void);

#endif /* SELFTEST_KVM_GUEST_MEMFD_H */
