#!/usr/bin/env python3
"""Run L1 and hand on what its command prints.  Runs inside the Debian tree, as root; lab/shell is what people call.

The command's output comes over two virtio-serial ports.  lab/l1-init ends each with a mark that has the command's
status, so that nothing is lost and nothing else gets in.  L1 never outlives this process.
"""

import argparse
import ctypes
import fcntl
import os
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time

import bochs

BUILD = "/gmem/build"
TIMED_OUT, NO_L1 = 124, 125

KVM_GET_SUPPORTED_CPUID = 0xc008ae05
# CPUID leaf, register in struct kvm_cpuid_entry2 (ecx), bit
NESTED = {"svm": (0x80000001, 5, 2), "vmx": (1, 5, 5)}


def say(text):
    print(f"lab: {text}", file=sys.stderr, flush=True)


def nesting():
    """What KVM of this machine lets a guest use for guests of its own: svm, vmx or nothing."""
    size = 256
    entries = bytearray(struct.pack("II", size, 0) + bytes(40 * size))
    try:
        with open("/dev/kvm", "r+b", buffering=0) as kvm:
            fcntl.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, entries)
    except OSError:
        return None
    count = struct.unpack_from("I", entries)[0]
    leaves = [struct.unpack_from("IIIIIII", entries, 8 + 40 * i) for i in range(count)]
    for name, (leaf, register, bit) in NESTED.items():
        if any(entry[0] == leaf and entry[register] >> bit & 1 for entry in leaves):
            return name
    return None


def accelerator(wanted, vendor):
    """QEMU's arguments, or None for Bochs: TCG has no VMX."""
    found = nesting()
    if wanted == "kvm" or (not wanted and found and vendor in ("", found)):
        say(f"L1 runs under KVM, which offers it {found or 'no nesting'}")
        return ["-accel", "kvm", "-cpu", "host"]
    emulator = "Bochs" if vendor == "vmx" else "TCG"
    say(f"L1 runs under {emulator}" + ("" if wanted else f": KVM of this machine, if any, offers no {vendor or 'nesting'}"))
    return None if vendor == "vmx" else ["-accel", "tcg,thread=multi", "-cpu", "max"]


def nodes(memory, cpus, prealloc):
    """Two nodes with half of the memory each; the CPUs are split as well."""
    args = []
    option = ",prealloc=on" if prealloc else ""
    for node in range(2):
        args += ["-object", f"memory-backend-ram,id=node{node},size={memory // 2}M{option}",
                 "-numa", f"node,nodeid={node},memdev=node{node}"]
    # One socket per CPU: two nodes in a socket make the kernel warn.
    return [*args, "-smp", f"{cpus},sockets={cpus}",
            *[arg for cpu in range(cpus) for arg in ("-numa", f"cpu,node-id={cpu * 2 // cpus},socket-id={cpu}")]]


def share(name, path, readonly=True):
    option = ",readonly=on,multidevs=remap" if readonly else ""
    return ["-fsdev", f"local,id={name},path={path},security_model=none{option}",
            "-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}"]


def arguments(options, accel, work, pipes):
    root = "root=root rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=524288,cache=loose ro"
    args = ["/gmem/repo/lab/bin/qemu-system-x86_64", "-machine", "q35", *accel,
            "-m", f"{options.memory // 2 * 2}M", *nodes(options.memory, options.cpus, options.prealloc),
            "-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{work}/console",
            "-kernel", f"{BUILD}/{options.flavour}/bzImage",
            "-append", f"console=ttyS0 panic=-1 log_buf_len=8M {root} init=/gmem/repo/lab/l1-init {options.params} "
                       f"-- {options.flavour}",
            *share("root", "/"), *share("work", work, readonly=False),
            "-device", "virtio-serial-pci"]
    if options.share:
        args += share("share", "/share")
    if options.plugin:
        args += ["-plugin", options.plugin]
    if options.command is None:
        return [*args, "-chardev", "stdio,id=tty,signal=off", "-device", "virtconsole,chardev=tty"]
    for name, pipe in pipes.items():
        args += ["-chardev", f"file,id={name},append=on,path=/dev/fd/{pipe}",
                 "-device", f"virtserialport,chardev={name},name={name}"]
    return args


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def start(options, work, pipes):
    """Run L1, as a context that gives a Popen object.  Without pipes it talks to the terminal."""
    accel = accelerator(options.accel, options.vendor)
    if not accel:
        return bochs.start(options, work, pipes.values(), die_with_parent)
    return subprocess.Popen(arguments(options, accel, work, pipes), pass_fds=pipes.values(), preexec_fn=die_with_parent,
                            stdin=subprocess.DEVNULL if pipes else None, stdout=2 if pipes else None)


class Stream:
    """One of the command's outputs, up to its mark."""

    def __init__(self, out, mark):
        self.read, self.write = os.pipe()
        self.out, self.mark = out, mark
        self.pending, self.status = b"", None

    def pump(self):
        data = self.pending + os.read(self.read, 1 << 16)
        at = data.find(self.mark)
        if at >= 0:
            end = data.find(b"\n", at)
            if end >= 0:
                self.status = int(data[at + len(self.mark):end])
            text, self.pending = data[:at], data[at:]
        else:
            # Keep what may be the beginning of the mark.
            keep = next((n for n in range(min(len(self.mark), len(data)), 0, -1) if self.mark.startswith(data[-n:])), 0)
            text, self.pending = data[:len(data) - keep], data[len(data) - keep:]
        while text:
            text = text[os.write(self.out, text):]


def watch(l1, streams, options):
    """Hand output on until both streams have ended; the command's status, or None if L1 has to be given up."""
    started = heard = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.read, selectors.EVENT_READ, stream)
        while any(stream.status is None for stream in streams):
            for key, _ in selector.select(timeout=0.5):
                key.data.pump()
                heard = time.monotonic()
                if key.data.status is not None:
                    selector.unregister(key.fd)
            now = time.monotonic()
            if options.timeout and now - started > options.timeout:
                say(f"L1 is killed: its command did not end within {options.timeout} s")
                return TIMED_OUT
            if options.silence and now - heard > options.silence:
                say(f"L1 is killed: it printed nothing for {options.silence} s")
                return TIMED_OUT
            if l1.poll() is not None and not selector.select(timeout=0):
                say("L1 is gone before its command ended")
                return NO_L1
    return None


def interactive(l1, work):
    try:
        saved = termios.tcgetattr(0)
    except termios.error:
        saved = None
    try:
        l1.wait()
    finally:
        if saved:
            termios.tcsetattr(0, termios.TCSADRAIN, saved)
    try:
        with open(f"{work}/status", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return NO_L1


def run(options, work):
    """Boot L1 with `work` as the folder it may write to; returns the status to exit with."""
    mark = f"\0end of output {os.urandom(8).hex()} ".encode()
    with open(f"{work}/mark", "wb") as file:
        file.write(mark[1:-1])
    streams = {}
    if options.command is not None:
        with open(f"{work}/command", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(options.command + "\n")
        streams = {"out": Stream(1, mark), "err": Stream(2, mark)}
    elif sys.stdin.isatty():
        size = os.get_terminal_size(0)
        with open(f"{work}/tty", "w", encoding="ascii") as file:
            file.write(f"rows {size.lines} cols {size.columns}\n")
    pipes = {name: stream.write for name, stream in streams.items()}
    with start(options, work, pipes) as l1:
        try:
            if not streams:
                return interactive(l1, work)
            given_up = watch(l1, list(streams.values()), options)
        finally:
            l1.kill()
    if given_up is None:
        return streams["out"].status
    for name in ("console", "bochs"):
        if os.path.exists(f"{work}/{name}"):
            say(f"the end of its {name}:")
            with open(f"{work}/{name}", "rb") as file:
                sys.stderr.write("".join(line.decode(errors="replace") for line in file.readlines()[-25:]))
    return given_up


def stop(number, _frame):
    sys.exit(128 + number)


def main():
    parser = argparse.ArgumentParser()
    for name in ("flavour", "params", "vendor", "accel", "command", "plugin"):
        parser.add_argument(f"--{name}")
    for name in ("memory", "cpus", "timeout", "silence"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("share", "keep", "prealloc"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stop)
    if options.keep:
        return run(options, "/mnt")
    os.makedirs(f"{BUILD}/l1", exist_ok=True)
    work = tempfile.mkdtemp(dir=f"{BUILD}/l1")
    try:
        return run(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
