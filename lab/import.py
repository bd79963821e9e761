#!/usr/bin/env python3
"""Read a tar archive from stdin and write it as a stream for git fast-import, without its first folder.

usage: lab/import.py MESSAGE <ARCHIVE.tar | git fast-import

Faster than unpacking and adding 86000 files.  The commit is dated by the newest file.
"""

import sys
import tarfile


def main():
    out, newest, lines = sys.stdout.buffer, 0, []
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        mark = 0
        for member in archive:
            path = member.name.removeprefix("./").partition("/")[2]
            if not (member.isfile() or member.issym()) or not path:
                continue
            newest = max(newest, int(member.mtime))
            mode = "120000" if member.issym() else "100755" if member.mode & 0o100 else "100644"
            data = member.linkname.encode() if member.issym() else archive.extractfile(member).read()
            mark += 1
            out.write(b"blob\nmark :%d\ndata %d\n%s\n" % (mark, len(data), data))
            lines.append(f"M {mode} :{mark} {path}\n")
    message = sys.argv[1].encode()
    out.write(b"commit refs/heads/base\ncommitter base <base@localhost> %d +0000\ndata %d\n%s\n"
              % (newest, len(message), message))
    out.write("".join(lines).encode())


main()
