# Sourced by the scripts of the lab: where things are, how to work inside the Debian tree, and how to speak.
# shellcheck shell=bash disable=SC2034
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$repo/build
logs=$build/log
cache=${XDG_CACHE_HOME:-$HOME/.cache}/gmem
tree=$cache/tree
me=${0##*/}

KERNEL=${KERNEL:-patched}
DEBUG=${DEBUG:-yes}
case $KERNEL:$DEBUG in
patched:yes | stock:yes) flavour=$KERNEL ;;
patched:no | stock:no) flavour=$KERNEL-nodebug ;;
debug:yes | kcsan:yes) flavour=$KERNEL ;;
# What lab/prefixes boots.
prefix:yes) flavour=at-prefix ;;
*) echo "lab: KERNEL is patched, stock, debug or kcsan, not '$KERNEL', and DEBUG yes or, for the former two, no, not '$DEBUG'" >&2; exit 1 ;;
esac
# Whose sources it is built from, and whose selftests go with it.
source=patched
[ "$KERNEL" != stock ] || source=stock
jobs_flag=-j${JOBS:-$(nproc)}

# What KVM in L1 shall use; nothing is svm, or what there is on a machine that can nest.
export HV=${HV-}
[[ $HV = @(|svm|vmx) ]] || { echo "lab: HV is svm or vmx, not '$HV'" >&2; exit 1; }

sudo=
[ "$EUID" = 0 ] || sudo=sudo

say() {
	printf 'lab: %s\n' "$*" >&2
}

die() {
	printf 'lab/%s: %s\n' "$me" "$*" >&2
	exit 1
}

# step LOG WHAT USUALLY COMMAND...: run it with its output in build/log/LOG.log; when it fails, say what, why, and where the log is.
step() {
	local log=$logs/$1.log what=$2 usually=$3 start=$SECONDS rc=0
	shift 3
	mkdir -p "$logs"
	say "$what (usually $usually)"
	# In a shell of its own, and not as a condition, so that "set -e" is in force.
	set +e
	(
		set -e
		"$@"
	) >"$log" 2>&1 </dev/null
	rc=$?
	set -e
	[ $rc != 0 ] || return 0
	grep -E -m 8 '(error|Error|ERROR|fatal|E): |\*\*\*' "$log" >&2 || tail -n 20 "$log" >&2
	die "could not $what, after $((SECONDS - start)) s; its log is $log"
}

# in_tree COMMAND...: run it inside the Debian tree as the calling user, or in_tree_root as root.
in_tree() {
	"$repo/lab/enter" "$@"
}

in_tree_root() {
	"$repo/lab/enter" --root "$@"
}

# lock_build WHAT: one build of it at a time in a checkout; a second one waits.
lock_build() {
	mkdir -p "$build"
	exec 9>"$build/.lock-$1"
	flock -n 9 || { say "another build of $1 runs in $build, waiting for it"; flock 9; }
}

# The state of the git tree DIR, its edits included, as one word that changes when it does.
tree_state() {
	{
		git -C "$1" rev-parse HEAD
		git -C "$1" diff HEAD
		git -C "$1" ls-files -z --others --exclude-standard | (cd "$1" && xargs -0 -r sha1sum)
	} | sha1sum | cut -d' ' -f1
}

clone_base() {
	rm -rf "${build:?}/$2"
	in_tree git clone -q --no-checkout "/gmem/src/$1-$3" "/gmem/build/$2"
	in_tree git -C "/gmem/build/$2" config gc.auto 0
	in_tree git -C "/gmem/build/$2" checkout -q --detach base
	echo "$3" >"$build/$2/.git/gmem-base"
}

# has_own DIR: whether build/DIR has commits or edits that patches/ does not have.  Debian's .gitignore has new files ignored.
has_own() {
	local applied
	applied=$(git -C "$build/$1" rev-parse -q --verify refs/gmem/applied 2>/dev/null) || return 1
	[ "$(git -C "$build/$1" rev-parse HEAD)" != "$applied" ] ||
		[ -n "$(git -C "$build/$1" status --porcelain --ignored | grep -v __pycache__)" ]
}

# lay_out PROJECT DIR VERSION WHAT USUALLY: a clone of the base in build/DIR, if that is not what it is
lay_out() {
	local is
	is=$(cat "$build/$2/.git/gmem-base" 2>/dev/null) || true
	[ "$is" != "$3" ] || return 0
	! has_own "$2" || die "build/$2 is of version $is and has edits or commits that the one of $3 would lose: 'make export' writes commits back to patches/, 'make discard' drops them"
	step "lay-out-$2" "$4" "$5" clone_base "$1" "$2" "$3"
}

# lay_out_linux: build/linux, or build/linux-stock for KERNEL=stock, is the base with, or without, the series as patches/ has it.
# Wants lock_build "linux-$source".
lay_out_linux() {
	local version dir=linux
	[ "$source" != stock ] || dir=linux-stock
	version=$("$repo/lab/source" linux)
	lay_out linux "$dir" "$version" 'lay out the base' '30 s'
	[ "$source" = stock ] || in_tree /gmem/repo/lab/series.py apply linux || die "the series does not apply to linux-source-6.12 $version"
}

# Parameters that turn nested paging off; one of the other vendor's module does nothing.
shadow='kvm_amd.npt=0 kvm_intel.ept=0'

# mode PARAMS: a name for these parameters and HV that can be a file's
mode() {
	local name=${1// /,}
	[ "$1" != "$shadow" ] || name=kvm_amd.npt=0
	[ "$HV" != vmx ] || name=vmx-${name/kvm_amd.npt/kvm_intel.ept}
	[ -n "$1" ] || name+=default
	echo "$name"
}
