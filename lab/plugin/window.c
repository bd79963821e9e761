/*
 * A plugin for QEMU's TCG: how many instructions does the kernel execute between two marks?
 *
 * guest_memfd_perf_test marks where a guest's write begins and ends with no-ops, see set_mark() there.  For each such window in
 * which the kernel ran, print how many of its instructions that took, but for those between the addresses given as skip=LOW-HIGH,
 * which is where pages are cleared; "next" whenever the test says so.  The test has to stay on one CPU.
 *
 *   -plugin window.so,out=FILE,skip=0xffffffff81000000-0xffffffff81000040
 */
#include <glib.h>
#include <qemu-plugin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

enum mark { MARK_BEGIN = 1, MARK_END, MARK_NEXT };

#define MAX_SKIPS 8

static uint64_t skips[MAX_SKIPS][2];
static int nr_skips;
static FILE *out;

struct counts {
	/* Of the kernel, without what is skipped; since this CPU started, and when the window began. */
	uint64_t kernel;
	uint64_t began;
};

static struct qemu_plugin_scoreboard *counts;
static qemu_plugin_u64 kernel, began;

static bool counted(uint64_t address)
{
	for (int i = 0; i < nr_skips; i++) {
		if (address >= skips[i][0] && address < skips[i][1])
			return false;
	}
	return address >> 63;
}

static void at_mark(unsigned int cpu, void *mark)
{
	uint64_t now = qemu_plugin_u64_get(kernel, cpu);

	switch (GPOINTER_TO_INT(mark)) {
	case MARK_BEGIN:
		qemu_plugin_u64_set(began, cpu, now);
		break;
	case MARK_END:
		if (now != qemu_plugin_u64_get(began, cpu))
			fprintf(out, "%" PRIu64 "\n", now - qemu_plugin_u64_get(began, cpu));
		break;
	case MARK_NEXT:
		fprintf(out, "next\n");
		break;
	}
}

/* nopl 0x67b0000N(%rax) */
static int mark_of(struct qemu_plugin_insn *insn)
{
	static const uint8_t start[] = { 0x0f, 0x1f, 0x80 }, end[] = { 0x00, 0xb0, 0x67 };
	uint8_t bytes[7];

	if (qemu_plugin_insn_size(insn) != sizeof(bytes) || qemu_plugin_insn_data(insn, bytes, sizeof(bytes)) != sizeof(bytes))
		return 0;
	return memcmp(bytes, start, sizeof(start)) || memcmp(bytes + 4, end, sizeof(end)) ? 0 : bytes[3];
}

static void at_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t size = qemu_plugin_tb_n_insns(tb);

	for (size_t i = 0; i < size; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		int mark = mark_of(insn);

		if (counted(qemu_plugin_insn_vaddr(insn)))
			qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(insn, QEMU_PLUGIN_INLINE_ADD_U64, kernel, 1);
		if (mark)
			qemu_plugin_register_vcpu_insn_exec_cb(insn, at_mark, QEMU_PLUGIN_CB_NO_REGS, GINT_TO_POINTER(mark));
	}
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		char *value = strchr(argv[i], '=');

		if (!value)
			return -1;
		*value++ = 0;
		if (!strcmp(argv[i], "out")) {
			out = fopen(value, "w");
		} else if (!strcmp(argv[i], "skip") && nr_skips < MAX_SKIPS) {
			if (sscanf(value, "%" SCNx64 "-%" SCNx64, &skips[nr_skips][0], &skips[nr_skips][1]) != 2)
				return -1;
			nr_skips++;
		} else {
			return -1;
		}
	}
	if (!out)
		return -1;
	/* L1 may be killed as soon as its command has ended. */
	setlinebuf(out);

	counts = qemu_plugin_scoreboard_new(sizeof(struct counts));
	kernel = qemu_plugin_scoreboard_u64_in_struct(counts, struct counts, kernel);
	began = qemu_plugin_scoreboard_u64_in_struct(counts, struct counts, began);
	qemu_plugin_register_vcpu_tb_trans_cb(id, at_translation);
	return 0;
}
