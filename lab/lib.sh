# Sourced by the scripts of the lab: where things are, and how they speak.
# shellcheck shell=bash disable=SC2034

lab=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$lab")
build=$repo/build
logs=$build/log
cache=${XDG_CACHE_HOME:-$HOME/.cache}/gmem
tree=$cache/tree
dl=$cache/dl

# shellcheck source=lab/versions
. "$lab/versions"

KERNEL=${KERNEL:-patched}
DEBUG=${DEBUG:-yes}
jobs=${JOBS:-$(nproc)}

# The folder below build/obj of a kernel: one for each of KERNEL= and DEBUG=.
flavour=$KERNEL
[ "$DEBUG" = yes ] || flavour+=-nodebug

sudo=
[ "$EUID" = 0 ] || sudo=sudo

me=${0##*/}

say() {
	echo "lab: $*" >&2
}

die() {
	echo "lab/$me: $*" >&2
	exit 1
}

case $KERNEL in
patched | stock) ;;
*) die "KERNEL=$KERNEL: it is patched or stock" ;;
esac

# step LOG "what (usually how long)" COMMAND...: run it with its output in the log; when it fails, say which, why, and where the log is.
step() {
	local log=$logs/$1 what=$2 start=$SECONDS
	shift 2
	mkdir -p "$logs"
	say "$what"
	if ! "$@" >"$log" 2>&1 </dev/null; then
		grep -E -m 5 '(error|Error|E):|\*\*\*' "$log" >&2 || tail -n 20 "$log" >&2
		die "failed after $((SECONDS - start)) s: ${what% (*}; its log is $log"
	fi
}

# One build at a time in this checkout; a second one waits.
lock_build() {
	mkdir -p "$build"
	exec 9>"$build/.lock"
	flock -n 9 || { say "another build runs in $build, waiting for it"; flock 9; }
}

# Where the sources of linux or qemu get built from, with KERNEL= applied.
source_dir() {
	if [ "$1" = linux ] && [ "$KERNEL" = stock ]; then
		echo linux-stock
	else
		echo "$1"
	fi
}

# Where the patches of linux or qemu are.
patches_dir() {
	case $1 in
	linux) echo "$repo/patches/linux-6.12" ;;
	qemu) echo "$repo/patches/qemu-10.0" ;;
	*) die "there is linux and qemu, not $1" ;;
	esac
}

# What the git tree of a source holds beyond its commit, as one line that changes when it does.
tree_state() {
	{
		git -C "$1" rev-parse HEAD
		git -C "$1" diff HEAD
		git -C "$1" ls-files -z --others --exclude-standard | (cd "$1" && xargs -0 -r sha1sum)
	} | sha1sum | cut -d' ' -f1
}
