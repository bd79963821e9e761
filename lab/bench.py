#!/usr/bin/env python3
"""Medians, ratios and plots of what lab/bench measured.

usage: bench.py DIR     reads main.csv, small.csv, scale.csv, vcpus.csv and windows there, as far as they exist, and writes table.md,
                        touch.svg, scale.svg, vcpus.svg and the same as PNG
"""

import collections
import csv
import os
import statistics
import subprocess
import sys

NAMES = {
    "anon_4k": "anonymous 4 KiB", "anon_thp": "anonymous THP", "memfd_thp": "memfd THP", "hugetlb_2m": "HugeTLB 2 MiB",
    "hugetlb_1g": "HugeTLB 1 GiB", "gmem_4k": "guest_memfd 4 KiB", "gmem_2m": "guest_memfd 2 MiB",
    "gmem_1g": "guest_memfd 1 GiB", "gmem_4k_mapped": "guest_memfd 4 KiB, mapped",
    "gmem_2m_mapped": "guest_memfd 2 MiB, mapped", "gmem_1g_mapped": "guest_memfd 1 GiB, mapped",
}
UNITS = {"ms": "ms", "us": "µs", "kib": "KiB", "percent": "%"}
# The order in which lab/bench has the instructions counted.
COUNTED = ("anon_thp", "hugetlb_2m", "gmem_2m")


class Samples:
    """The samples of a part: values by backing, MiB, vCPUs and figure, each the median of its round."""

    def __init__(self, path):
        samples = collections.defaultdict(lambda: collections.defaultdict(list))
        with open(path, encoding="ascii", newline="") as file:
            for row in csv.DictReader(file):
                key = (row["backing"], int(row["mib"]), int(row["vcpus"]), row["figure"])
                samples[key][int(row["round"])].append(float(row["value"]))
        self.values = {key: {number: statistics.median(values) for number, values in rounds.items()}
                       for key, rounds in samples.items()}

    def median(self, backing, mib, vcpus, figure):
        values = self.values.get((backing, mib, vcpus, figure))
        return statistics.median(values.values()) if values else None

    def ratio(self, backing, base, mib, vcpus, *figures):
        """Median of the ratios within each round, of the sum of the figures, which are times."""
        ratios = []
        for number in range(self.rounds()):
            sums = [sum(self.values.get((name, mib, vcpus, figure), {}).get(number, 0) * (1000 if figure.endswith("_ms") else 1)
                        for figure in figures) for name in (backing, base)]
            if all(sums):
                ratios.append(sums[0] / sums[1])
        return statistics.median(ratios) if ratios else None

    def rounds(self):
        return max(len(values) for values in self.values.values())

    def each(self, index):
        found = dict.fromkeys(key[index] for key in self.values)
        return [name for name in NAMES if name in found] if index == 0 else list(found)


def load(folder, part):
    path = os.path.join(folder, f"{part}.csv")
    return Samples(path) if os.path.exists(path) else None


def windows(folder):
    """Instructions outside of the clearing of pages for each fault, by backing."""
    path = os.path.join(folder, "windows")
    if not os.path.exists(path):
        return {}
    groups = []
    with open(path, encoding="ascii") as file:
        for line in file:
            if line == "next\n":
                groups.append([])
            elif groups:
                groups[-1].append(int(line))
    # A timer may interrupt what's no fault; the faults of 256 MiB are the 128 largest.
    return {name: statistics.median(sorted(group)[-128:]) for name, group in zip(COUNTED, groups) if len(group) >= 128}


def figures_table(samples):
    mib, backings = 1024, samples.each(0)
    yield (f"{mib} MiB, one vCPU, medians of {samples.rounds()} rounds; in brackets the ratio to anonymous THP, median of the ratios "
           "within each round.  What the figures are is told at the top of `guest_memfd_perf_test.c`.\n")
    yield "| figure | " + " | ".join(NAMES[name] for name in backings) + " |"
    yield "| --- |" + " ---: |" * len(backings)
    for figure in samples.each(3):
        name, _, unit = figure.rpartition("_")
        title = f"{name.replace('_', ' ')}, {UNITS[unit]}" if unit in UNITS else figure
        cells = []
        for backing in backings:
            value = samples.median(backing, mib, 1, figure)
            ratio = samples.ratio(backing, "anon_thp", mib, 1, figure) if unit in ("ms", "us") else None
            cells.append("–" if value is None else f"{value:.4g}" + (f" ({ratio:.2f})" if ratio else ""))
        yield f"| {title} | " + " | ".join(cells) + " |"


def line_table(samples, axis, index, note):
    """First touch per GiB; `index` is that of what varies."""
    points = samples.each(index)
    yield f"{note}, ms per GiB, medians of {samples.rounds()} rounds.\n"
    yield f"| {axis} | " + " | ".join(str(point) for point in points) + " |"
    yield "| --- |" + " ---: |" * len(points)
    for backing in samples.each(0):
        cells = []
        for point in points:
            mib, vcpus = (point, 1) if index == 1 else (1024, point)
            value = samples.median(backing, mib, vcpus, "cold_ms")
            cells.append("–" if value is None else f"{value * 1024 / mib:.1f}")
        yield f"| {NAMES[backing]} | " + " | ".join(cells) + " |"


def small_table(samples):
    """First touch of 256 MiB, of which a page of 1 GiB is four times as much."""
    bases = ("anon_thp", "gmem_4k")
    yield f"First touch of 256 MiB, medians of {samples.rounds()} rounds, and of the ratios within each round.\n"
    yield "| | ms | " + " | ".join(f"ratio to {NAMES[base]}" for base in bases) + " |"
    yield "| --- |" + " ---: |" * (1 + len(bases))
    for backing in samples.each(0):
        value = samples.median(backing, 256, 1, "cold_ms")
        ratios = [samples.ratio(backing, base, 256, 1, "cold_ms") for base in bases]
        yield f"| {NAMES[backing]} | {value:.1f} | " + " | ".join("–" if ratio is None else f"{ratio:.3g}" for ratio in ratios) + " |"


def goals(main, scale, instructions):
    """What is to be reached: name, limit, what was measured (None if it was not), and if less is better."""
    def figure(backing, name):
        return main.median(backing, 1024, 1, name) if main else None

    def ratio(base, *figures):
        return main.ratio("gmem_2m", base, 1024, 1, *figures) if main else None

    def per(a, b):
        return a / b if a is not None and b else None

    def scaled(mib):
        value = scale.median("gmem_2m", mib, 1, "cold_ms") if scale else None
        return value and value / mib

    yield "first touch, guest_memfd 2 MiB to anonymous THP", 0.6, ratio("anon_thp", "cold_ms"), True
    yield "first touch, guest_memfd 2 MiB to HugeTLB 2 MiB", 0.8, ratio("hugetlb_2m", "cold_ms"), True
    yield "first touch, guest_memfd 2 MiB to guest_memfd 4 KiB", 0.1, ratio("gmem_4k", "cold_ms"), True
    yield "faults for 1 GiB at 2 MiB", 512, figure("gmem_2m", "faults"), True
    yield "faults for 1 GiB at 1 GiB", 1, figure("gmem_1g", "faults"), True
    yield ("instructions of the kernel for a fault, outside of clear_page(), guest_memfd 2 MiB to anonymous THP", 0.6,
           per(instructions.get("gmem_2m"), instructions.get("anon_thp")), True)
    yield "KVM's page tables for 1 GiB at 2 MiB, KiB", 32, figure("gmem_2m", "secondary_kib"), True
    yield "host page tables of an unmapped guest_memfd, KiB", 0, figure("gmem_2m", "host_kib"), True
    yield "memory back in 2 MiB after dirty logging, %", 99, figure("gmem_2m", "recovered_percent"), False
    yield "end of logging and recovery, guest_memfd 2 MiB to HugeTLB 2 MiB", 1, ratio("hugetlb_2m", "dirty_stop_us", "recovery_ms"), True
    yield "first touch per GiB, guest_memfd 2 MiB, 8 GiB to 256 MiB", 1.1, per(scaled(8192), scaled(256)), True
    yield "warm random access, guest_memfd 2 MiB to HugeTLB 2 MiB", 1.02, ratio("hugetlb_2m", "warm_ms"), True


def goals_table(main, scale, instructions):
    yield "| figure | goal | measured | |"
    yield "| --- | ---: | ---: | --- |"
    for name, limit, value, less in goals(main, scale, instructions):
        if value is None:
            yield f"| {name} | {'≤' if less else '≥'} {limit} | – | not measured |"
        else:
            reached = round(value, 3) <= limit if less else value >= limit
            yield f"| {name} | {'≤' if less else '≥'} {limit} | {value:.4g} | {'reached' if reached else '**missed**'} |"


def parts_table(samples):
    """What a first touch consists of: memory is found and zeroed, the guest walks over it, and the rest is the faults."""
    yield "What the first touch of 1 GiB consists of, ms.  Populating is done by the VMM, the pass by a guest that has it mapped.\n"
    yield "| | first touch | populating | one pass | the rest: faults |"
    yield "| --- |" + " ---: |" * 4
    for backing in ("anon_thp", "hugetlb_2m", "gmem_2m"):
        values = [samples.median(backing, 1024, 1, figure) for figure in ("cold_ms", "populate_ms", "recovery_ms")]
        if None not in values:
            cells = [*values, values[0] - values[1] - values[2]]
            yield f"| {NAMES[backing]} | " + " | ".join(f"{value:.0f}" for value in cells) + " |"


def plot(folder, name, commands, data):
    """The same picture as SVG and as PNG."""
    path = os.path.join(folder, name)
    with open(f"{path}.dat", "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in data)
    for terminal, suffix in (("svg noenhanced size 800,420 font 'sans,12' background 'white'", "svg"), ("png noenhanced size 800,420", "png")):
        script = [f"set terminal {terminal}", f"set output '{path}.{suffix}'", "set encoding utf8", "set grid ytics", *commands]
        subprocess.run(["gnuplot"], input="\n".join(script) + "\n", text=True, check=True)


def plot_touch(folder, samples):
    data = [f'"{NAMES[name]}" {samples.median(name, 1024, 1, "cold_ms")}' for name in samples.each(0)
            if samples.median(name, 1024, 1, "cold_ms") is not None]
    plot(folder, "touch", ["set title 'First touch of 1 GiB by the guest'", "set ylabel 'ms'", "set logscale y",
                           "set style fill solid 0.6", "set boxwidth 0.7", "set xtics rotate by -30", "unset key",
                           f"plot '{folder}/touch.dat' using 2:xtic(1) with boxes linecolor rgb '#3b6ea5'"], data)


def plot_lines(folder, name, samples, index, title, label):
    points, backings = samples.each(index), samples.each(0)
    data = []
    for point in points:
        mib, vcpus = (point, 1) if index == 1 else (1024, point)
        values = [samples.median(backing, mib, vcpus, "cold_ms") for backing in backings]
        data.append(f"{point} " + " ".join("?" if value is None else str(value * 1024 / mib) for value in values))
    lines = ", ".join(f"'{folder}/{name}.dat' using 1:{i + 2} with linespoints title '{NAMES[backing]}'"
                      for i, backing in enumerate(backings))
    plot(folder, name, [f"set title '{title}'", "set ylabel 'ms per GiB'", f"set xlabel '{label}'", "set logscale x 2",
                        "set yrange [0:*]", "set datafile missing '?'", "set key outside", f"plot {lines}"], data)


def main():
    folder = sys.argv[1]
    samples = {part: load(folder, part) for part in ("main", "small", "scale", "vcpus")}
    instructions = windows(folder)
    text = list(goals_table(samples["main"], samples["scale"], instructions))
    if samples["main"]:
        text += ["", *figures_table(samples["main"]), "", *parts_table(samples["main"])]
        plot_touch(folder, samples["main"])
    if samples["small"]:
        text += ["", *small_table(samples["small"])]
    if samples["scale"]:
        text += ["", *line_table(samples["scale"], "MiB", 1, "First touch by one vCPU")]
        plot_lines(folder, "scale", samples["scale"], 1, "First touch, by size", "MiB")
    if samples["vcpus"]:
        text += ["", *line_table(samples["vcpus"], "vCPUs", 2, "First touch of 1024 MiB by several vCPUs")]
        plot_lines(folder, "vcpus", samples["vcpus"], 2, "First touch of 1 GiB, by vCPUs", "vCPUs")
    if instructions:
        text += ["", "Instructions of the kernel for a fault of 2 MiB, outside of clear_page(), medians of 128: " +
                 ", ".join(f"{NAMES[name]} {value:.0f}" for name, value in instructions.items()) + "."]
    with open(os.path.join(folder, "table.md"), "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in text)
    print("\n".join(text))


main()
