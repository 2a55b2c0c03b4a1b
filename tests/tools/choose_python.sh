#!/usr/bin/env bash
# Print the Python to install into: of those on the PATH that Clarion runs on, the fastest. A version manager often
# compiles one without its optimisations, and everything then takes half as long again; the system's own stands behind it.
set -u

probe='
import ensurepip, sys, time, venv
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(1)
def work():
    found = {}
    for number in range(20000):
        text = f"{number}"
        found[text] = len(text) + number
    return sum(found.values())
took = []
for _ in range(7):
    begun = time.perf_counter()
    work()
    took.append(time.perf_counter() - begun)
print(round(min(took) * 1e6))
'

best='' fastest=0
for name in python3.13 python3.12 python3.11 python3; do
  while read -r path; do
    took=$("$path" -c "$probe" 2> /dev/null) || continue
    # One that is not a fifth faster is not worth another version.
    if [ -z "$best" ] || [ $((took * 5)) -lt $((fastest * 4)) ]; then
      best=$path fastest=$took
    fi
  done < <(type -aP "$name")
done
echo "$best"
