#!/usr/bin/env bash
# Runs the end-to-end tests in two labs side by side: most of their time is waiting.
# Each lab has clusters, laptop and daemon of its own, and runs every second test.
set -uo pipefail
cd "$(dirname "$0")"
bin=../../bin/e2e.test
limit=${1:-65m}
logs=$(mktemp -d)
pids=()
# Ctrl-C reaches the tests, too, which take their labs down.
trap 'wait; rm -rf "$logs"; exit 130' INT TERM
for shard in 0 1; do
	run=$("$bin" -test.list '^Test' | awk -v s=$shard 'NR % 2 == s' | paste -sd '|')
	CULVERT_LAB=$([ $shard = 0 ] && echo culvert || echo culvert2) \
		"$bin" -test.v -test.timeout "$limit" -test.run "^($run)\$" >"$logs/$shard" 2>&1 &
	pids+=($!)
done
tail -n +1 -f --pid="${pids[0]}" "$logs/0" &
shown=$!
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
wait "$shown"
cat "$logs/1"
echo "=== both labs"
grep -hE '^--- (PASS|FAIL|SKIP)' "$logs/0" "$logs/1" | sort | uniq -c | awk '{ n[$3]++ } END { for (k in n) print n[k], k }'
grep -hE '^\s*--- FAIL' "$logs/0" "$logs/1"
rm -rf "$logs"
exit $failed
