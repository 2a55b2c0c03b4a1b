#!/usr/bin/env bash
# Install the servers that the tests talk to, from the system's packages, where root may. Otherwise name them.
set -euo pipefail
# dicom-rs, an implementation of the upper layer that is not DCMTK's: built once, where there is a Rust tool chain.
rs=0.10.0 cache="${XDG_CACHE_HOME:-$HOME/.cache}/clarion"
if command -v cargo >/dev/null && [ ! -x "$cache/dicom-storescu-$rs/bin/dicom-storescu" ]; then
  echo "servers: building dicom-storescu $rs (about two minutes, once)"
  build="$(mktemp -d)"
  CARGO_TARGET_DIR="$build" cargo install --quiet --locked --root "$cache/dicom-storescu-$rs" "dicom-storescu@$rs" ||
    echo "servers: dicom-storescu could not be built"
  rm -rf "$build"
fi
declare -A wanted=([/usr/bin/storescu]=dcmtk [/usr/sbin/Orthanc]=orthanc [/usr/share/orthanc/plugins/libOrthancDicomWeb.so]=orthanc-dicomweb [/usr/bin/chromium]=chromium [/usr/bin/strace]=strace [/usr/bin/java]=default-jre-headless [/usr/bin/mvn]=maven [/usr/sbin/ip]=iproute2)
missing=()
compgen -G "/usr/lib/postgresql/*/bin/postgres" >/dev/null || missing+=(postgresql)
for program in "${!wanted[@]}"; do [ -e "$program" ] || missing+=("${wanted[$program]}"); done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  echo "servers: installing ${missing[*]} from the system's packages"
  export DEBIAN_FRONTEND=noninteractive
  for try in 1 2 3; do
    if apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/tmp/clarion-servers.log 2>&1; then
      # These packages start servers of their own; the tests start theirs on free ports.
      for one in orthanc postgresql; do service "$one" stop >/dev/null 2>&1 || true; done
      exit 0
    fi
    echo "servers: try $try failed"
  done
  tail -n 5 /tmp/clarion-servers.log
  exit 3
fi
echo "servers: the tests also want ${missing[*]}; install them (Debian: sudo apt-get install ${missing[*]}). Tests that need them are skipped."
