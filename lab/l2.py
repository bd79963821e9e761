"""An L2 whose RAM is on guest_memfd, started from inside L1, and what KVM, QEMU and the file know about it."""

import ctypes
import fcntl
import glob
import json
import mmap
import os
import re
import shutil
import signal
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

# What makes Linux start faster on emulated CPUs: no search of 8192 PCI functions for an AGP aperture, and none for buses that ACPI
# does not know; no mitigations.
BOOT = ("console=ttyS0 quiet panic=-1 reboot=t nokaslr mitigations=off tsc=reliable no_timer_check "
        "iommu=noaperture pci=lastbus=0")

MIB = 1 << 20
GIB = 1 << 30
MEM_LOG_DIRTY_PAGES, MEM_READONLY, MEM_GUEST_MEMFD = 1, 2, 4

GUEST_MEMFD_FLAG_HUGE_2M = 1 << 16
KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD_FLAGS, KVM_CAP_GUEST_MEMFD_SLOTS = 0xae01, 0xae03, 244, 0x474d01
GUEST_MEMFD_SLOTS_LOG_DIRTY = 1 << 2
KSFT_SKIP = 4


class Failure(Exception):
    """L2 did not do what was expected of it."""


def skip(reason):
    """End the test as one that this machine cannot run."""
    print(f"1..0 # SKIP {reason}")
    sys.exit(KSFT_SKIP)


def check_extension(capability):
    """What KVM says about a capability of a default VM."""
    try:
        with open("/dev/kvm", "rb") as kvm:
            vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    except OSError as error:
        skip(f"no VM: {error}")
    result = fcntl.ioctl(vm, KVM_CHECK_EXTENSION, capability)
    os.close(vm)
    return result


def guest_memfd_flags():
    """The flags that KVM_CREATE_GUEST_MEMFD takes on a default VM."""
    return check_extension(KVM_CAP_GUEST_MEMFD_FLAGS)


def logs_dirty_pages():
    """Whether KVM logs dirty pages of a guest_memfd."""
    return bool(check_extension(KVM_CAP_GUEST_MEMFD_SLOTS) & GUEST_MEMFD_SLOTS_LOG_DIRTY)


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


def require_dirty_log():
    """Skip the test where a VM on guest_memfd cannot be migrated or saved."""
    if not logs_dirty_pages():
        skip("this kernel does not log dirty pages of a guest_memfd")


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


def add_to_initrd(directory, files):
    """L2's initrd with more behind it, in `directory`: {path in L2: path of a file here, or a script's text}."""
    root = os.path.join(directory, "root")
    for path, source in files.items():
        place = os.path.join(root, path.lstrip("/"))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if source.startswith("#!"):
            with open(place, "w", encoding="utf-8") as file:
                file.write(source)
        else:
            shutil.copy(source, place)
        os.chmod(place, 0o755)
    initrd = os.path.join(directory, "initrd")
    shutil.copy(f"{IMAGE}/initrd", initrd)
    with open(initrd, "ab") as file:
        # Linux looks for the next archive at a multiple of 4.
        file.write(bytes(-file.tell() % 4))
        file.flush()
        subprocess.run("find . | cpio -o -H newc -R 0:0 --quiet", shell=True, check=True, stdout=file, cwd=root)
    shutil.rmtree(root)
    return initrd


def build(directory, name, *options):
    """Build a program of lab/tests, by default one that runs in L2, and return its path."""
    program = os.path.join(directory, name)
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", f"{name}.c")
    subprocess.run(["cc", "-O2", *(options or ["-static"]), "-o", program, source], check=True)
    return program


def run_cases(cases, names):
    """Run the functions named, or all, as TAP; the status to exit with."""
    unknown = [name for name in names if name not in cases]
    if unknown:
        sys.exit(f"{' '.join(unknown)}: there are {' '.join(cases)}")
    names = names or list(cases)
    failed = 0
    print("TAP version 13")
    print(f"1..{len(names)}", flush=True)
    for number, name in enumerate(names, 1):
        started = time.monotonic()
        try:
            cases[name]()
            result = "ok"
        except Failure as failure:
            print("\n".join(f"# {line}" for line in str(failure).splitlines()))
            result = "not ok"
            failed += 1
        print(f"{result} {number} {name} # {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failed else 0


class File:
    """A file of another process, such as a guest_memfd, mapped here.  Looking at it allocates nothing."""

    SYS_PIDFD_GETFD = 438

    def __init__(self, pid, fd, size):
        self.libc = ctypes.CDLL(None, use_errno=True)
        process = os.pidfd_open(pid)
        self.fd = self.libc.syscall(self.SYS_PIDFD_GETFD, process, fd, 0)
        os.close(process)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        self.size = size
        self.map = mmap.mmap(self.fd, size, mmap.MAP_SHARED)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def held(self):
        """One byte per page of 4 KiB: 1 if the file holds it."""
        vector = ctypes.create_string_buffer(self.size // 4096)
        if self.libc.mincore(ctypes.c_void_p(self.address), ctypes.c_size_t(self.size), vector):
            raise OSError(ctypes.get_errno(), "mincore")
        return bytes(byte & 1 for byte in vector.raw)

    def madvise(self, offset, size, advice):
        if self.libc.madvise(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(size), advice):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def close(self):
        self.map.close()
        os.close(self.fd)


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

    def kill(self):
        """End QEMU, and with it its memory, before the `with` statement ends."""
        self.qemu.kill()
        self.qemu.wait()

    @staticmethod
    def _read(path):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def console(self):
        return self._read(self.console_path)

    def errors(self):
        """What QEMU has printed."""
        return self._read(self.errors_path)

    def threads(self):
        """A line for each thread of QEMU: its state, its CPU time in clock ticks, and where in the kernel it is."""
        for task in sorted(glob.glob(f"/proc/{self.qemu.pid}/task/*")):
            state, *numbers = self._read(f"{task}/stat").rpartition(")")[2].split() or ["gone"]
            stack = re.findall(r" (\w+)\+0x", self._read(f"{task}/stack"))
            yield f"{self._read(f'{task}/comm').strip()}: {state}, {' + '.join(numbers[10:12])} ticks, {' < '.join(stack[:6])}"

    def cpus(self):
        """Registers of L2's CPUs and of their interrupt controllers."""
        for cpu in self.qmp("query-cpus-fast"):
            number = cpu["cpu-index"]
            for command in ("info registers", f"info lapic {number}"):
                text = self.qmp("human-monitor-command", **{"command-line": command, "cpu-index": number})
                yield from (f"{number}: {line}" for line in text.splitlines() if not line.startswith(("F", "XMM")))

    def stall(self, what):
        """Fail as it does not go on, and tell what QEMU and L2's CPUs are about, as far as QEMU still answers."""
        def give_up(*_):
            raise Failure("QEMU's monitor does not answer")

        state = [f"thread {line}" for line in self.threads()]
        handler = signal.signal(signal.SIGALRM, give_up)
        signal.alarm(30)
        try:
            state += [f"CPU {line}" for line in self.cpus()]
        except Failure as failure:
            state.append(str(failure))
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
        self.fail("\n".join([what, *state, *[f"thread {line}" for line in self.threads()]]))

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
                self.stall(f"L2 did not say \"{marker}\" within {timeout} s")
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

    def hmp(self, line):
        """Run a command of the human monitor; what it prints is an error."""
        text = self.qmp("human-monitor-command", **{"command-line": line})
        if text.strip():
            raise Failure(f"{line}: {text.strip()}")

    def wait_for(self, what, condition, timeout=120):
        """Poll until the condition holds, and return it."""
        deadline = time.monotonic() + timeout
        while True:
            result = condition()
            if result:
                return result
            if self.qemu.poll() is not None:
                self.fail(f"QEMU ended with status {self.qemu.returncode}, waiting for {what}")
            if time.monotonic() > deadline:
                self.stall(f"{what}: not within {timeout} s")
            time.sleep(0.2)

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
