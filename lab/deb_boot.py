"""Boot the disk that lab/deb-boot made with the kernel that was installed on it, and hand on what lab/deb-check prints."""

import os
import signal
import subprocess
import sys
import time

import boot

# An emulated Debian that boots, then makes an L2 work on its memory.
PATIENCE = 1200
# MiB, as for the tests.
MEMORY = 10240
OK = "deb-check: ok"


def main():
    release, work = sys.argv[1:]
    accel = boot.accelerator("", "")
    initrd = f"{work}/initrd.img-{release}"
    initrd = ["-initrd", initrd] if os.path.exists(initrd) else []
    args = ["/gmem/repo/lab/bin/qemu-system-x86_64", "-machine", "q35", *accel, *boot.nodes(MEMORY, 2, False), "-m", f"{MEMORY}M",
            "-nodefaults", "-display", "none", "-no-reboot",
            "-drive", f"file={work}/disk,format=raw,if=virtio", "-serial", f"file:{work}/console", "-serial", f"file:{work}/out",
            "-kernel", f"{work}/vmlinuz-{release}", *initrd,
            "-append", "console=ttyS0 root=/dev/vda rw panic=-1 systemd.run=/gmem/repo/lab/deb-check"]
    with open(f"{work}/out", "wb"):
        pass
    with open(f"{work}/out", encoding="utf-8", errors="replace") as out, \
            subprocess.Popen(args, stdin=subprocess.DEVNULL, preexec_fn=boot.die_with_parent) as machine:
        deadline = time.monotonic() + PATIENCE
        said = ""
        try:
            while True:
                ended = machine.poll() is not None
                text = out.read()
                said += text
                sys.stdout.write(text)
                sys.stdout.flush()
                if ended:
                    break
                if time.monotonic() > deadline:
                    boot.say(f"it is killed: it did not end within {PATIENCE} s")
                    break
                time.sleep(0.5)
        finally:
            machine.kill()
    if OK in said.splitlines():
        return 0
    boot.say("the end of its console:")
    with open(f"{work}/console", encoding="utf-8", errors="replace") as console:
        sys.stderr.write("".join(console.readlines()[-25:]))
    return 1


for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, boot.stop)
sys.exit(main())
