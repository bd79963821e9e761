# Every entry point; the scripts in lab/ do the work and document their variables at their top.
.DEFAULT_GOAL := help
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

# What the user set goes to the scripts as it was typed: a $ in CMD is the shell's, not make's.
settings := KERNEL DEBUG HV KVER QVER KVM_PARAMS MEM CPUS CMD SHARE OUT ACCEL EMULATOR TIMEOUT SILENCE TESTS SLOW SUITE CELL AGAIN L1S TEST_SECONDS ROUNDS ONLY BOOT KCONFIG DEBUG_SYMBOLS PLUGIN PREALLOC JOBS BUG LIMIT
$(foreach v,$(settings),$(if $(filter undefined,$(origin $(v))),,$(eval override $(v) := $$(value $(v)))$(eval export $(v))))

.PHONY: help run check matrix shell linux qemu selftests bench series static prefixes plant deb export discard clean distclean

help: ## this
	@lab/help
run: ## build everything, boot L1, run a Debian VM in it with all its RAM on guest_memfd, and show what maps it
	@lab/run
check: ## run the tests; TESTS='a b' picks some, SUITE=full runs all KVM selftests and compares them with the stock kernel
	@lab/check
matrix: ## run the series' tests and the full suite on AMD and Intel in all three MMUs; CELL='vmx/*' picks some
	@lab/matrix
shell: ## a root shell in L1, or that command with CMD='...'; SHARE=DIR is shown at /share
	@lab/linux && lab/qemu && lab/shell
linux: ## build L1's kernel: base plus series, KERNEL=stock without the series, KERNEL=debug with KASAN and the like
	@lab/linux
qemu: ## build QEMU with the series
	@lab/qemu
selftests: ## build the KVM selftests
	@lab/selftests
bench: ## measure what a guest's memory costs by what backs it: a table, samples and plots in build/bench/
	@lab/bench
series: ## the mailable form of both series, with cover letters, in build/series/, checked by checkpatch
	@lab/mail
static: ## check the Linux series with sparse, coccinelle, checkpatch, W=1, and build its documentation
	@lab/static
prefixes: ## build each prefix of both series, of Linux with W=1, and boot those that change the kernel; takes two hours
	@lab/prefixes
plant: ## plant bugs in KVM, one for each rule among them, and see how long a test takes to find each
	@lab/plant
deb: ## build installable packages of the kernel and QEMU in build/deb, and try them in a fresh Debian 13; takes one to two hours
	@lab/deb
export: ## write the commits of build/linux and build/qemu back to patches/ and the added files
	@lab/export
discard: ## drop commits and edits in build/linux and build/qemu that were not exported
	@lab/discard
clean: ## remove build output
	@lab/clean
distclean: ## remove build output and caches
	@lab/clean --caches
