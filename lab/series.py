#!/usr/bin/env python3
"""Turn patches/ and the added files into commits of a built tree, and back.

usage: lab/series.py apply|discard|export|mail PROJECT

apply   commits the series on top of tag "base" of build/PROJECT, one commit per patch, and checks the result out.
        Leaves a tree alone that has commits or edits which have not been exported.
discard drops such commits and edits, then applies.
export  writes the commits base..HEAD of build/PROJECT back to patches/ and, for Linux, the files they add to
        the places they have in the kernel tree.
mail    writes the commits as git format-patch does, with a cover letter, to build/series/PROJECT.

A patch in patches/ has only edits to files of the base.  A file that the series adds is stored as a whole, in its
final form, and arrives with the patch that names it in a New-file: line.  If later patches edit it, their diffs
are taken back to find out what it looked like when it arrived.

A commit says in a Topic: line which folder of patches/ it belongs to; the line is not part of the patch.

Runs inside the Debian tree.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile

REPO = "/gmem/repo"
PATCHES = {"linux": "patches/linux-6.12", "qemu": "patches/qemu-10.0"}
ADDED_ROOTS = ("arch/", "virt/", "include/", "tools/", "Documentation/")
APPLIED = "refs/gmem/applied"


class Error(Exception):
    """Something the user has to look at."""


def run(*args, cwd, stdin=None, env=None, check=True):
    result = subprocess.run(args, cwd=cwd, input=stdin, capture_output=True, check=False,
                            env={**os.environ, **(env or {})})
    if check and result.returncode:
        raise Error(f"{' '.join(args)}: {result.stderr.decode()}{result.stdout.decode()}")
    return result.stdout


class Patch:
    """A patch file: who, when, what, and a diff without the files it adds."""

    def __init__(self, path):
        self.path = path
        self.name = os.path.relpath(path, REPO)
        self.topic = os.path.basename(os.path.dirname(path))
        with open(path, "rb") as file:
            mail = file.read()
        with tempfile.TemporaryDirectory() as tmp:
            msg, diff = os.path.join(tmp, "msg"), os.path.join(tmp, "diff")
            info = run("git", "mailinfo", "-k", msg, diff, cwd=tmp, stdin=mail).decode()
            with open(msg, encoding="utf-8") as file:
                body = file.read()
            with open(diff, "rb") as file:
                self.diff = file.read()
        if b"diff --git" not in self.diff:
            self.diff = b""
        fields = dict(line.split(": ", 1) for line in info.splitlines() if ": " in line)
        self.author, self.email, self.date = fields["Author"], fields["Email"], fields["Date"]
        subject = re.sub(r"^\[PATCH[^]]*\] ", "", fields["Subject"])
        self.added = re.findall(r"^New-file: *(\S+)", body, re.M)
        self.message = f"{subject}\n\n{body.strip()}\n"

    def touched(self):
        return set(re.findall(rb"^diff --git a/(\S+) b/", self.diff, re.M))


def patches(project):
    found = []
    top = os.path.join(REPO, PATCHES[project])
    for folder, dirs, files in os.walk(top):
        dirs.sort()
        found += [os.path.join(folder, name) for name in files if name.endswith(".patch")]
    return [Patch(path) for path in sorted(found)]


def arrivals(series):
    """What the added files look like when they arrive, by path."""
    result = {}
    with tempfile.TemporaryDirectory() as tmp:
        for patch in reversed(series):
            edited = [path for path in map(bytes.decode, patch.touched()) if os.path.exists(os.path.join(tmp, path))
                      or any(path in earlier.added for earlier in series)]
            for path in edited:
                place = os.path.join(tmp, path)
                if not os.path.exists(place):
                    os.makedirs(os.path.dirname(place), exist_ok=True)
                    shutil.copyfile(os.path.join(REPO, path), place)
                try:
                    run("git", "apply", "-R", f"--include={path}", "-", cwd=tmp, stdin=patch.diff)
                except Error as error:
                    raise Error(f"{patch.name} does not come off {path}: {error}") from None
            for path in patch.added:
                place = os.path.join(tmp, path)
                if not os.path.exists(place):
                    place = os.path.join(REPO, path)
                if not os.path.exists(place):
                    raise Error(f"{patch.name} names a new file that is not there: {path}")
                with open(place, "rb") as file:
                    result[path] = file.read()
    return result


def with_topic(message, topic):
    lines = message.rstrip("\n").split("\n")
    at = next((i for i, line in enumerate(lines) if line.startswith("Signed-off-by:")), len(lines))
    return "\n".join(lines[:at] + [f"Topic: {topic}"] + lines[at:]) + "\n"


def commit_series(tree, series):
    new_files = arrivals(series)
    parent = run("git", "rev-parse", "base^{commit}", cwd=tree).decode().strip()
    with tempfile.TemporaryDirectory() as tmp:
        index = {"GIT_INDEX_FILE": os.path.join(tmp, "index")}
        run("git", "read-tree", "base", cwd=tree, env=index)
        for patch in series:
            if patch.diff:
                try:
                    run("git", "apply", "--cached", "-", cwd=tree, stdin=patch.diff, env=index)
                except Error as error:
                    raise Error(f"{patch.name} does not apply:\n{error}") from None
            for path in patch.added:
                blob = run("git", "hash-object", "-w", "--stdin", cwd=tree, stdin=new_files[path]).decode().strip()
                run("git", "update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", cwd=tree, env=index)
            root = run("git", "write-tree", cwd=tree, env=index).decode().strip()
            who = {"GIT_AUTHOR_NAME": patch.author, "GIT_AUTHOR_EMAIL": patch.email, "GIT_AUTHOR_DATE": patch.date,
                   "GIT_COMMITTER_NAME": patch.author, "GIT_COMMITTER_EMAIL": patch.email,
                   "GIT_COMMITTER_DATE": patch.date}
            parent = run("git", "commit-tree", root, "-p", parent, cwd=tree, env=who,
                         stdin=with_topic(patch.message, patch.topic).encode()).decode().strip()
    return parent


def fingerprint(project, tree):
    """Of all that the commits are made from."""
    digest = hashlib.sha1(run("git", "rev-parse", "base^{commit}", cwd=tree))
    for top in (PATCHES[project], *(ADDED_ROOTS if project == "linux" else ()), "lab/series.py"):
        path = os.path.join(REPO, top)
        found = [path] if os.path.isfile(path) else sorted(
            os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        for name in found:
            with open(name, "rb") as file:
                digest.update(f"{name}\0{os.path.getsize(name)}\0".encode() + file.read())
    return digest.hexdigest()


def apply(project, tree):
    head = run("git", "rev-parse", "HEAD", cwd=tree).decode().strip()
    applied = run("git", "rev-parse", "-q", "--verify", APPLIED, cwd=tree, check=False).decode().strip()
    run("git", "update-index", "-q", "--refresh", cwd=tree, check=False)
    edits = run("git", "diff", "--name-only", "HEAD", cwd=tree).decode().split()
    if edits or head not in (applied, run("git", "rev-parse", "base^{commit}", cwd=tree).decode().strip()):
        print(f"build/{project} has {'edits' if edits else 'commits'} of its own and is left as it is; 'make export' "
              f"writes commits back to patches/, 'make discard' drops them", file=sys.stderr)
        return
    # It takes seconds to find out that they are the same.
    stamp, state = os.path.join(tree, ".git", "gmem-series"), fingerprint(project, tree)
    if os.path.exists(stamp):
        with open(stamp, encoding="ascii") as file:
            if file.read() == f"{state} {head}":
                return
    tip = commit_series(tree, patches(project))
    if tip != head:
        run("git", "checkout", "-q", "--detach", tip, cwd=tree)
    run("git", "update-ref", APPLIED, tip, cwd=tree)
    with open(stamp, "w", encoding="ascii") as file:
        file.write(f"{state} {tip}")


def discard(project, tree):
    run("git", "checkout", "-q", "-f", "--detach", "base", cwd=tree)
    apply(project, tree)


def commits(tree):
    return run("git", "rev-list", "--reverse", "base..HEAD", cwd=tree).decode().split()


def export(project, tree):
    if run("git", "diff", "--name-only", "HEAD", cwd=tree).strip():
        raise Error(f"build/{project} has edits that are not committed")
    top = os.path.join(REPO, PATCHES[project])
    # Lay everything out beside the real thing first, so that an error leaves that alone.
    staging = top + ".new"
    shutil.rmtree(staging, ignore_errors=True)
    topic, number, added_by_series = None, {}, []
    for commit in commits(tree):
        message = run("git", "log", "-1", "--format=%B", commit, cwd=tree).decode().rstrip("\n") + "\n"
        found = re.search(r"^Topic: *(\S+)\n", message, re.M)
        topic = found.group(1) if found else topic
        if not topic:
            raise Error(f"{commit}: no Topic: line, and no commit before it has one")
        message = re.sub(r"^Topic: .*\n", "", message, flags=re.M)
        added = []
        if project == "linux":
            added = [path for path in run("git", "diff-tree", "--no-commit-id", "--name-only", "-r", "--diff-filter=A",
                                          commit, cwd=tree).decode().split() if path.startswith(ADDED_ROOTS)]
        message = re.sub(r"^New-file: .*\n", "", message, flags=re.M)
        if added:
            new = "".join(f"New-file: {path}\n" for path in added)
            message = re.sub(r"^(?=Signed-off-by:)", new, message, count=1, flags=re.M)
        added_by_series += added
        subject, _, body = message.partition("\n")
        who = run("git", "log", "-1", "--format=From: %an <%ae>%nDate: %aD", commit, cwd=tree).decode()
        edits = ["--", "."] + [f":(exclude){path}" for path in added]
        stat = run("git", "diff", "--stat=72", "--no-renames", f"{commit}^", commit, *edits, cwd=tree).decode()
        diff = run("git", "diff", "--no-renames", "--abbrev=12", f"{commit}^", commit, *edits, cwd=tree)
        number[topic] = number.get(topic, 0) + 1
        slug = re.sub(r"[^A-Za-z0-9]+", "-", subject).strip("-")[:60].rstrip("-")
        place = os.path.join(staging, topic, f"{number[topic]:04}-{slug}.patch")
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(f"{who}Subject: [PATCH] {subject}\n{body.rstrip()}\n---\n{stat}\n".encode() + diff)
    before = {path for patch in (patches(project) if os.path.isdir(top) else []) for path in patch.added}
    shutil.rmtree(top, ignore_errors=True)
    os.rename(staging, top)
    for path in added_by_series:
        place = os.path.join(REPO, path)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(run("git", "cat-file", "blob", f"HEAD:{path}", cwd=tree))
    for path in before - set(added_by_series):
        os.remove(os.path.join(REPO, path))
    run("git", "update-ref", APPLIED, "HEAD", cwd=tree)


def evidence():
    """The last table of "make matrix" that was put into the README, which is the test evidence of the cover letter."""
    with open(os.path.join(REPO, "README.md"), encoding="utf-8") as file:
        return file.read().split("<!-- make matrix -->\n")[1]


def mail(project, tree):
    out = os.path.join(REPO, "build/series", project)
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    with tempfile.TemporaryDirectory() as tmp:
        # Rewrite the commits without the lines that are of use to this repository only.
        parent = run("git", "rev-parse", "base^{commit}", cwd=tree).decode().strip()
        for commit in commits(tree):
            message = run("git", "log", "-1", "--format=%B", commit, cwd=tree).decode()
            message = re.sub(r"^(Topic|New-file): .*\n", "", message, flags=re.M)
            message = re.sub(r"\n{3,}", "\n\n", message)
            name, email, date = run("git", "log", "-1", "--format=%an%n%ae%n%aD", commit, cwd=tree).decode().split("\n")[:3]
            who = {"GIT_AUTHOR_NAME": name, "GIT_AUTHOR_EMAIL": email, "GIT_AUTHOR_DATE": date,
                   "GIT_COMMITTER_NAME": name, "GIT_COMMITTER_EMAIL": email, "GIT_COMMITTER_DATE": date}
            parent = run("git", "commit-tree", f"{commit}^{{tree}}", "-p", parent, cwd=tree, env=who,
                         stdin=message.encode()).decode().strip()
        cover = os.path.join(tmp, "cover")
        with open(os.path.join(REPO, f"lab/cover-{project}"), encoding="utf-8") as source, \
                open(cover, "w", encoding="utf-8") as target:
            target.write(source.read().replace("@matrix@\n", evidence()))
        run("git", "-c", f"user.name={name}", "-c", f"user.email={email}", "format-patch", "-q", "--cover-letter",
            f"--description-file={cover}", "--cover-from-description=subject", "--no-renames", "--zero-commit",
            "--no-signature", "-o", out, f"base..{parent}", cwd=tree)


def main():
    if len(sys.argv) != 3 or sys.argv[2] not in PATCHES:
        print(__doc__)
        return 2
    verb = {"apply": apply, "discard": discard, "export": export, "mail": mail}[sys.argv[1]]
    try:
        verb(sys.argv[2], os.path.join(REPO, "build", sys.argv[2]))
    except Error as error:
        print(f"series: {error}", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
