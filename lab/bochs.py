"""L1 on Bochs, whose CPU has VMX with EPT.  lab/boot.py uses it.

Bochs knows neither virtio nor 9p, so L1 boots from a CD, finds its files on disks, and hands out what it prints over serial
ports: the console on the first one, the command's stdout and stderr on the next two, or its terminal on the second.

    sda   the Debian tree, made by lab/l1-disk
    sdb   /gmem and /share: copies of what L1 needs of this checkout, and of SHARE=
    sdc   /run/work, written through, so that what a killed L1 wrote is there
"""

import contextlib
import os
import shutil
import subprocess
import tempfile

BUILD = "/gmem/build"
ROOT = "/gmem/l1/root.ext4"
# Bochs keeps no more than that of L1's memory in its own; what is in use beyond is in a temporary file.
HOST_MB = 2048

# What a second is to L1, in instructions.  Bochs gets about 80 million done in one of a CPU of today.
IPS = 100_000_000

# With smaller blocks of memory Bochs hangs at its start if there are more than 5 GiB.
CONFIG = """\
display_library: nogui
romimage: file=/usr/share/bochs/BIOS-bochs-latest, options=fastboot
vgaromimage: file=/usr/share/vgabios/vgabios.bin
cpu: model=corei7_skylake_x, count={cpus}, ips={ips}
memory: guest={memory}, host={host}, block_size=1024
clock: sync=none, time0=utc
vga: update_freq=1, realtime=0
log: {log}
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata0-master: type=disk, mode=volatile, path={root}, journal={work}/root.redolog
ata0-slave: type=disk, mode=flat, path={work}/files.ext4
ata1-master: type=disk, mode=flat, path={work}/work.ext4
ata1-slave: type=cdrom, path={work}/cd.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={console}
"""

GRUB = """\
set timeout=0
menuentry L1 {{
	linux /bzImage {line}
}}
"""


def make_disk(path, folder, extra):
    """An ext4 file system with what is in `folder`, and room for `extra` MiB more."""
    used = int(subprocess.check_output(["du", "-sm", "--apparent-size", folder]).split()[0])
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^resize_inode", "-E", "root_owner=0:0", "-b", "4096",
                    "-m", "0", "-d", folder, path, f"{used + used // 8 + extra}M"], check=True)


def copy(source, target):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    subprocess.run(["cp", "-a", source, target], check=True)


def make_files(options, work):
    """The disk with what L1 shows as /gmem and /share."""
    folder = f"{work}/files"
    for path in ("repo", "build", "l2", "share"):
        os.makedirs(f"{folder}/{path}")
    copy("/gmem/repo/lab", f"{folder}/repo/lab")
    copy(f"{BUILD}/{options.flavour}/lib/modules", f"{folder}/build/{options.flavour}/lib/modules")
    for name in os.listdir(BUILD):
        if name.startswith("selftests-"):
            copy(f"{BUILD}/{name}", f"{folder}/build/{name}")
    if options.share:
        copy("/share/.", f"{folder}/share")
    make_disk(f"{work}/files.ext4", folder, 16)
    shutil.rmtree(folder)


def make_cd(options, work):
    folder = f"{work}/cd"
    os.makedirs(f"{folder}/boot/grub")
    copy(f"{BUILD}/{options.flavour}/bzImage", f"{folder}/bzImage")
    # CPUID has the frequency of the real CPU, by which a second would be 35 times as long.  Nodes as by QEMU's -numa.  No MWAIT when
    # idle: Bochs doesn't see a write that another CPU has in its TLB, so a CPU sleeps on, and each MONITOR wakes the other CPUs.
    line = ("console=ttyS0,115200 panic=-1 log_buf_len=8M root=/dev/sda rootfstype=ext4 ro numa=fake=2 idle=halt "
            f"tsc_early_khz={IPS // 1000} {options.params} init=/bin/sh "
            f"-- -c 'mount -r /dev/sdb /gmem && exec /gmem/repo/lab/l1-init {options.flavour} bochs'")
    with open(f"{folder}/boot/grub/grub.cfg", "w", encoding="ascii") as file:
        file.write(GRUB.format(line=line))
    subprocess.run(["grub-mkrescue", "-o", f"{work}/cd.iso", folder], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Bochs:
    """The methods of subprocess.Popen that boot.py uses."""

    def __init__(self, process, collect):
        self.process, self.collect = process, collect
        self.poll = process.poll

    def wait(self):
        self.process.wait()
        self.collect()

    def kill(self):
        if self.process.returncode is None:
            self.process.kill()
            self.wait()


@contextlib.contextmanager
def start(options, kept, ports, preexec_fn):
    """Run L1 in Bochs; `kept` is the folder that L1 may write to, `ports` get the command's stdout and stderr."""
    os.makedirs(f"{BUILD}/l1", exist_ok=True)
    with tempfile.TemporaryDirectory(dir=f"{BUILD}/l1") as work:
        make_files(options, work)
        make_cd(options, work)
        os.mkdir(f"{work}/work")
        for name in os.listdir(kept):
            if name in ("mark", "command", "tty"):
                copy(f"{kept}/{name}", f"{work}/work/{name}")
        make_disk(f"{work}/work.ext4", f"{work}/work", 256)
        config = CONFIG.format(cpus=options.cpus, ips=IPS, memory=options.memory, host=min(options.memory, HOST_MB), root=ROOT, work=work, log=f"{kept}/bochs.log",
                               console=f"{kept}/console")
        if ports:
            for com, port in zip(("com2", "com3"), ports):
                config += f"{com}: enabled=1, mode=file, dev=/dev/fd/{port}\n"
        else:
            config += f"com2: enabled=1, mode=term, dev={os.ttyname(0)}\n"
        with open(f"{work}/bochsrc", "w", encoding="ascii") as file:
            file.write(config)

        def collect():
            subprocess.run(["debugfs", "-R", f"rdump / {kept}", f"{work}/work.ext4"], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            os.rmdir(f"{kept}/lost+found")

        with open(f"{kept}/bochs", "wb") as file:
            process = subprocess.Popen([f"{BUILD}/bochs/bochs", "-q", "-f", f"{work}/bochsrc"], stdin=subprocess.DEVNULL,
                                       stdout=file, stderr=file, pass_fds=ports, preexec_fn=preexec_fn)
        yield Bochs(process, collect)
