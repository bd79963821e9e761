"""An L2 whose RAM is on guest_memfd, started from inside L1, and what KVM, QEMU and the file know about it."""

import fcntl
import glob
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

IMAGE = os.environ.get("GMEM_L2", "/lab/l2")
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
ACCEL = os.environ.get("L2_ACCEL", "kvm")
# Options of the memory-backend-memfd that L2's RAM is in.  Default: a guest_memfd of 2 MiB folios if KVM has those.
BACKEND = os.environ.get("L2_BACKEND", "")

# What makes Linux start faster on emulated CPUs: no search for an AGP aperture in 8192 PCI functions, no mitigations.
BOOT = ("console=ttyS0 quiet panic=-1 reboot=t nokaslr mitigations=off tsc=reliable no_timer_check "
        "iommu=noaperture")

MIB = 1 << 20
GIB = 1 << 30
MEM_LOG_DIRTY_PAGES, MEM_READONLY, MEM_GUEST_MEMFD = 1, 2, 4


GUEST_MEMFD_FLAG_HUGE_2M = 1 << 16
KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD_FLAGS = 0xae01, 0xae03, 244
KSFT_SKIP = 4


class Failure(Exception):
    """L2 did not do what was expected of it."""


def skip(reason):
    """End the test as one that this machine cannot run."""
    print(f"1..0 # SKIP {reason}")
    sys.exit(KSFT_SKIP)


def guest_memfd_flags():
    """The flags that KVM_CREATE_GUEST_MEMFD takes on a default VM."""
    try:
        with open("/dev/kvm", "rb") as kvm:
            vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    except OSError as error:
        skip(f"no VM: {error}")
    flags = fcntl.ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD_FLAGS)
    os.close(vm)
    return flags


def two_dimensional_paging():
    """Whether KVM uses NPT or EPT.  In shadow page tables, the guest's own page sizes limit those of KVM."""
    for parameter in ("/sys/module/kvm_amd/parameters/npt", "/sys/module/kvm_intel/parameters/ept"):
        if os.path.exists(parameter):
            with open(parameter, encoding="ascii") as file:
                return file.read().strip() in ("Y", "1")
    return False


def require_guest_memfd():
    """Skip the test where a default VM's memory cannot be on guest_memfd."""
    if ACCEL == "kvm" and not guest_memfd_flags():
        skip("this kernel has no guest_memfd for default VMs")


def backend_options():
    """What follows memory-backend-memfd,id=,size= to put a backend on guest_memfd."""
    if BACKEND:
        return BACKEND
    return "guest-memfd=on,hugetlb=on" if guest_memfd_flags() & GUEST_MEMFD_FLAG_HUGE_2M else "guest-memfd=on"


def backend(name, size, options=None):
    """The -object argument of a backend; `size` as QEMU writes it, such as 1G."""
    return f"memory-backend-memfd,id={name},size={size},{options or backend_options()}"


def machine(kind, size, options=None):
    """Arguments for a machine that has all its RAM in one backend."""
    return ["-machine", f"{kind},memory-backend=m", "-object", backend("m", size, options), "-m", size]


def size_text(size):
    """A size for people: 640K, 512M, 1G."""
    for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)


class Slot:
    """One memslot, as KVM has it now."""

    def __init__(self, space, slot, flags, gpa, size, host_address, fd, offset):
        self.space, self.slot, self.flags = space, slot, flags
        self.gpa, self.size, self.end = gpa, size, gpa + size
        self.host_address, self.fd, self.offset = host_address, fd, offset

    @property
    def on_guest_memfd(self):
        return bool(self.flags & MEM_GUEST_MEMFD)

    @property
    def flag_names(self):
        names = (("LOG_DIRTY", MEM_LOG_DIRTY_PAGES), ("READONLY", MEM_READONLY), ("GUEST_MEMFD", MEM_GUEST_MEMFD))
        return "|".join(name for name, bit in names if self.flags & bit) or "-"

    def __str__(self):
        where = f"fd {self.fd} @ {self.offset:#x}" if self.on_guest_memfd else "-"
        return (f"{self.space:5}  {self.slot:4}  {self.gpa >> 12:#09x}-{(self.end - 1) >> 12:#09x}  "
                f"{size_text(self.size):>6}  {where:18}  {self.flag_names}")

    HEADER = "space  slot  gfn range              size  file offset         flags"


SLOT_UPDATE = re.compile(
    r"kvm_set_user_memory AddrSpace#(\d+) Slot#(\d+) flags=(0x[0-9a-f]+) gpa=(0x[0-9a-f]+) size=(0x[0-9a-f]+) "
    r"ua=(0x[0-9a-f]+) guest_memfd=(-?\d+) guest_memfd_offset=(0x[0-9a-f]+) ret=(-?\d+)")


def replay_slots(log):
    """The memslots that are left when every successful update in QEMU's trace log has been made."""
    slots = {}
    for update in SLOT_UPDATE.finditer(log):
        space, slot, flags, gpa, size, host_address, fd, offset, ret = (int(text, 0) for text in update.groups())
        if ret < 0:
            continue
        if size:
            slots[space, slot] = Slot(space, slot, flags, gpa, size, host_address, fd, offset)
        else:
            slots.pop((space, slot), None)
    return sorted(slots.values(), key=lambda slot: (slot.space, slot.gpa))


class L2:
    """A running L2.  Use it in a `with` statement: nothing of it is left afterwards, however that ends."""

    def __init__(self, args, job="", initrd=f"{IMAGE}/initrd", env=None):
        self.directory = tempfile.mkdtemp(prefix="l2.")
        self.console_path = os.path.join(self.directory, "console")
        self.log_path = os.path.join(self.directory, "qemu.log")
        monitor = os.path.join(self.directory, "monitor")
        console_input = os.path.join(self.directory, "input")
        os.mkfifo(console_input)
        # Open for both, so that neither side's open has to wait for the other.
        self.input = os.open(console_input, os.O_RDWR)
        self.seen = 0
        self.monitor = None
        self.command = [
            QEMU, "-accel", ACCEL, "-smp", "2", *args,
            "-display", "none", "-no-reboot", "-monitor", "none",
            "-chardev", f"file,id=console,path={self.console_path},input-path={console_input}",
            "-serial", "chardev:console",
            "-qmp", f"unix:{monitor},server=on,wait=off",
            "-trace", "kvm_set_user_memory", "-D", self.log_path,
            "-kernel", f"{IMAGE}/vmlinuz", "-initrd", initrd,
            "-append", f"{BOOT} {job}"]
        self.errors_path = os.path.join(self.directory, "stderr")
        with open(self.errors_path, "w", encoding="utf-8") as errors:
            self.qemu = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
                                         env={**os.environ, **(env or {})})
        self.monitor_path = monitor

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if self.qemu.poll() is None:
            self.qemu.kill()
            self.qemu.wait()
        if self.monitor:
            self.monitor.close()
        os.close(self.input)
        shutil.rmtree(self.directory)

    @staticmethod
    def _read(path):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def console(self):
        return self._read(self.console_path)

    def fail(self, what):
        """Raise a Failure that carries the last lines L2 and QEMU printed."""
        tail = [f"console: {line}" for line in self.console().splitlines()[-80:]]
        tail += [f"qemu: {line}" for line in self._read(self.errors_path).splitlines()[-5:]]
        raise Failure("\n".join([what, *tail]))

    def expect(self, marker, timeout=120):
        """Wait until the console shows the line `l2: MARKER...`, and return it.  Lines are looked at once, in order."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.qemu.poll() is not None
            lines = self.console().split("\n")[:-1]
            for number, line in enumerate(lines[self.seen:], self.seen + 1):
                # Firmware may leave its escape sequences at the start of a line.
                line = line[line.find("l2: "):].strip()
                if line.startswith("l2: ") and "FAILED" in line:
                    self.fail(line)
                if line.startswith(f"l2: {marker}"):
                    self.seen = number
                    return line
            if ended:
                self.fail(f"QEMU ended with status {self.qemu.returncode} before L2 said \"{marker}\"")
            if time.monotonic() > deadline:
                self.fail(f"L2 did not say \"{marker}\" within {timeout} s")
            time.sleep(0.1)

    def release(self):
        """Let a job with l2.hold go on."""
        os.write(self.input, b"\n")

    def finish(self, timeout=60):
        """Let L2 end by itself."""
        self.release()
        self.expect("end", timeout)
        try:
            status = self.qemu.wait(timeout)
        except subprocess.TimeoutExpired:
            self.fail("QEMU did not end after L2 did")
        if status:
            self.fail(f"QEMU ended with status {status}")

    def _connect(self, timeout=60):
        deadline = time.monotonic() + timeout
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self.monitor_path)
                return connection
            except OSError:
                connection.close()
            if self.qemu.poll() is not None:
                self.fail(f"QEMU ended with status {self.qemu.returncode}")
            if time.monotonic() > deadline:
                self.fail("QEMU opened no monitor")
            time.sleep(0.1)

    def qmp(self, command, **arguments):
        """Run a QMP command and return its result."""
        if not self.monitor:
            connection = self._connect()
            self.monitor = connection.makefile("rw", encoding="utf-8")
            connection.close()
            self.qmp("qmp_capabilities")
        try:
            json.dump({"execute": command, "arguments": arguments}, self.monitor)
            self.monitor.write("\n")
            self.monitor.flush()
            for line in self.monitor:
                answer = json.loads(line)
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise Failure(f"{command}: {answer['error']['desc']}")
        except ConnectionError:
            pass
        return self.fail(f"QEMU closed its monitor at {command}")

    def slots(self):
        """The live memslots."""
        return replay_slots(self._read(self.log_path))

    def mapped(self):
        """How many pages of each size KVM maps for the guest: {"4k": n, "2m": n, "1g": n}."""
        [directory] = glob.glob(f"/sys/kernel/debug/kvm/{self.qemu.pid}-*")
        return {size: int(self._read(f"{directory}/pages_{size}")) for size in ("4k", "2m", "1g")}

    def files(self):
        """{fd: {"flags": n, "size": n, "4k": bytes held, "2m": ..., "1g": ...}} of each guest_memfd of the VM."""
        files = {}
        for link in glob.glob(f"/proc/{self.qemu.pid}/fd/*"):
            try:
                if "kvm-gmem" not in os.readlink(link):
                    continue
            except FileNotFoundError:
                continue
            fd = int(os.path.basename(link))
            info = self._read(f"/proc/{self.qemu.pid}/fdinfo/{fd}")
            files[fd] = {key: int(value, 0) for key, value in re.findall(r"^gmem_(\w+):\s*(\w+)$", info, re.M)}
        return files
