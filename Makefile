# Every entry point; the scripts in lab/ do the work and document their variables.
.DEFAULT_GOAL := help
SHELL := /bin/bash
export KERNEL KVER QVER KVM_PARAMS MEM CPUS CMD SHARE TIMEOUT TESTS SUITE KMAKE TIMEOUT_TEST

# Unset what the user did not set: "make shell" without CMD= is interactive.
unexport_empty = $(foreach v,KERNEL KVER QVER KVM_PARAMS MEM CPUS CMD SHARE TIMEOUT TESTS SUITE KMAKE TIMEOUT_TEST,$(if $(filter undefined,$(origin $(v))),$(v)))
ifneq ($(strip $(unexport_empty)),)
unexport $(unexport_empty)
endif

.PHONY: help run check shell linux qemu selftests series prefixes export discard clean distclean

help: ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r v t; do printf '  make %-10s %s\n' "$$v" "$$t"; done
	@echo
	@echo 'Variables: KERNEL=patched|stock, KVER= (version of linux-source-6.12), KVM_PARAMS=, MEM= (MiB), CPUS=, CMD=, SHARE=, TESTS=, SUITE=full'
	@echo 'Caches: $${XDG_CACHE_HOME:-~/.cache}/gmem.  Build output and logs: build/.'

run: ## build everything, boot L1, run a Debian VM in it with all its RAM on guest_memfd, and show what maps it
	@lab/run
check: ## run the tests; TESTS='a b' picks some, SUITE=full runs all KVM selftests and compares them to the stock kernel
	@lab/check
shell: ## a root shell in L1, or with CMD='...' that command; SHARE=DIR is shown at /share
	@lab/shell
linux: ## build L1's kernel: base plus series, KERNEL=stock without the series
	@lab/linux
qemu: ## build the patched QEMU
	@lab/qemu
selftests: ## build the KVM selftests
	@lab/selftests
series: ## the series as mail, with cover letters, for Linux and QEMU, in build/series/, checked by checkpatch
	@lab/mail
prefixes: ## build each prefix of the Linux series with W=1
	@lab/prefixes
export: ## write the commits of build/linux and build/qemu back to patches/ and the added files
	@lab/export
discard: ## drop commits and edits in build/linux and build/qemu that were not exported
	@lab/discard
clean: ## remove build output
	@rm -rf build
distclean: clean ## remove build output and caches
	@rm -rf --one-file-system "$${XDG_CACHE_HOME:-$$HOME/.cache}/gmem/"{tree,src,ccache,l2}
