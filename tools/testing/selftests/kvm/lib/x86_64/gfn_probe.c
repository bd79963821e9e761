// SPDX-License-Identifier: GPL-2.0-only
/*
 * Count how often a function in KVM is called for a range of gfns, by means of
 * a kprobe in a tracing instance of its own.
 */
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "gfn_probe.h"
#include "test_util.h"

#define TRACEFS	"/sys/kernel/tracing"

/* The event's group, and the name of the instance. */
static void probe_group(const struct gfn_probe *probe, char *group, size_t size)
{
	snprintf(group, size, "%s_%d", probe->function, getpid());
}

static int probe_write(const struct gfn_probe *probe, const char *file,
		       const char *text)
{
	char group[64], path[256];
	int fd, err = 0;

	probe_group(probe, group, sizeof(group));
	snprintf(path, sizeof(path), TRACEFS "/instances/%s/events/%s/%s/%s",
		 group, group, probe->function, file);

	fd = open(path, O_WRONLY);
	if (fd < 0)
		return errno;
	if (write(fd, text, strlen(text)) < 0)
		err = errno;
	close(fd);
	return err;
}

static int write_kprobe_events(const char *text)
{
	int fd = open(TRACEFS "/kprobe_events", O_WRONLY | O_APPEND), err = 0;

	if (fd < 0)
		return errno;
	if (write(fd, text, strlen(text)) < 0)
		err = errno;
	close(fd);
	return err;
}

const char *gfn_probe_install(struct gfn_probe *probe, uint64_t first_gfn,
			      uint64_t last_gfn)
{
	static const char * const regs[] = { "%di", "%si", "%dx", "%cx", "%r8", "%r9" };
	char group[64], path[256], text[256];
	int err;

	TEST_ASSERT(probe->arg >= 1 && probe->arg <= ARRAY_SIZE(regs),
		    "Argument %d is not in a register", probe->arg);

	if (access(TRACEFS "/kprobe_events", W_OK)) {
		mount("tracefs", TRACEFS, "tracefs", 0, NULL);
		if (access(TRACEFS "/kprobe_events", W_OK))
			return TRACEFS "/kprobe_events cannot be written";
	}

	probe_group(probe, group, sizeof(group));
	snprintf(path, sizeof(path), TRACEFS "/instances/%s", group);
	if (mkdir(path, 0700))
		return "the tracing instance cannot be created";

	snprintf(text, sizeof(text), "p:%s/%s %s gfn=%s:u64", group,
		 probe->function, probe->function, regs[probe->arg - 1]);
	err = write_kprobe_events(text);
	if (err) {
		rmdir(path);
		return strerror(err);
	}
	probe->installed = true;
	probe->total = 0;

	snprintf(text, sizeof(text), "gfn >= 0x%lx && gfn <= 0x%lx", first_gfn, last_gfn);
	err = probe_write(probe, "filter", text);
	if (!err)
		err = probe_write(probe, "enable", "1");
	if (err) {
		gfn_probe_remove(probe);
		return strerror(err);
	}

	return NULL;
}

/*
 * Count what was ever written to the trace, as formatting each event takes long,
 * and clearing the trace leaves out what is of CPUs that are offline.
 */
uint64_t gfn_probe_read(struct gfn_probe *probe)
{
	static const char * const keys[] = { "entries", "overrun", "dropped events" };
	char group[64], path[256], line[256];
	uint64_t total = 0, nr;
	glob_t stats;
	FILE *file;

	probe_group(probe, group, sizeof(group));
	snprintf(path, sizeof(path), TRACEFS "/instances/%s/per_cpu/cpu*/stats", group);
	TEST_ASSERT(!glob(path, 0, NULL, &stats), "There is no %s", path);
	for (size_t i = 0; i < stats.gl_pathc; i++) {
		file = fopen(stats.gl_pathv[i], "r");
		TEST_ASSERT(file, "Cannot open %s, %s", stats.gl_pathv[i], strerror(errno));
		while (fgets(line, sizeof(line), file)) {
			for (int j = 0; j < ARRAY_SIZE(keys); j++) {
				size_t len = strlen(keys[j]);

				if (!strncmp(line, keys[j], len) && line[len] == ':')
					total += strtoull(&line[len + 1], NULL, 10);
			}
		}
		fclose(file);
	}
	globfree(&stats);

	nr = total - probe->total;
	probe->total = total;
	return nr;
}

void gfn_probe_remove(struct gfn_probe *probe)
{
	char group[64], path[256], text[256];

	if (!probe->installed)
		return;
	probe->installed = false;

	probe_group(probe, group, sizeof(group));
	probe_write(probe, "enable", "0");

	snprintf(path, sizeof(path), TRACEFS "/instances/%s", group);
	rmdir(path);

	snprintf(text, sizeof(text), "-:%s/%s", group, probe->function);
	write_kprobe_events(text);
}
