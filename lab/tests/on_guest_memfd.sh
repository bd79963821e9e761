# Sourced by the tests that run KVM's stock selftests with all of their memory in a guest_memfd whose userspace_addr is 0.
# shellcheck shell=bash
cd "${SELFTESTS:?is where the KVM selftests are, lab/l1-check sets it}" || exit
# A memslot on guest_memfd takes two.
ulimit -n 8192

# try TYPE SECONDS TEST ARGUMENT...: pass, skip, or fail
try() {
	local type=$1 seconds=$2 test
	test=$(find . -name "$3" -type f -executable)
	shift 3
	KVM_SELFTESTS_MEM_SRC=$type timeout "$seconds" "$test" "$@" >/tmp/log 2>&1
	case $? in
	0) echo pass ;;
	4) echo skip ;;
	124) echo timeout ;;
	*) echo fail ;;
	esac
}

# compare SECONDS TEST...: what passes on anonymous memory must pass on guest_memfd of 4 KiB and of 2 MiB pages, at the second try at
# the latest: xen_shinfo_test e.g. fails in one of some 30 runs on any memory.  A test may come with arguments.
compare() {
	local seconds=$1 types=(anonymous guest_memfd guest_memfd_2mb) failed=0 passed=0 number=0 test type results result line
	shift
	echo "TAP version 13"
	echo "1..$#"
	for test in "$@"; do
		results=()
		for type in "${types[@]}"; do
			# shellcheck disable=SC2086
			result=$(try "$type" "$seconds" $test)
			[ "$result" = pass ] || sed "s/^/# ${test%% *} on $type: /" /tmp/log
			# Some wait for what an emulated CPU that is shared with others doesn't always get done in time.
			if [[ $result = @(fail|timeout) ]]; then
				echo "# ${test%% *} on $type: $result, once more"
				# shellcheck disable=SC2086
				result=$(try "$type" "$seconds" $test)
				[ "$result" = pass ] || sed "s/^/# ${test%% *} on $type: /" /tmp/log
			fi
			results+=("$result")
		done
		number=$((number + 1))
		line="$number $test: $(paste -d ' ' <(printf '%s\n' "${types[@]}") <(printf '%s\n' "${results[@]}") | paste -sd,)"
		case ${results[*]} in
		'pass pass pass')
			passed=$((passed + 1))
			echo "ok $line"
			;;
		pass*)
			failed=$((failed + 1))
			echo "not ok $line"
			;;
		*) echo "ok $line # SKIP" ;;
		esac
	done
	[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
}
