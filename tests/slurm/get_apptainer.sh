#!/bin/bash
# get_apptainer.sh DIR: a real Apptainer for the tests, in DIR alone; then put DIR/usr/bin on PATH. About 10 s.
# For x86_64 Debian machines whose own suite has no apptainer: it comes, with the newer C library that it wants, from
# Debian unstable at the mirror that apt uses, through an apt with a state of its own. Nothing is installed system-wide.
# Needs on the machine: squashfs-tools, squashfuse, uidmap, patchelf.
set -euo pipefail
mkdir -p "$1"
target=$(cd "$1" && pwd -P)
state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT
for program in mksquashfs squashfuse newuidmap patchelf; do
    command -v "$program" >/dev/null || { echo "$program is missing: apt-get install squashfs-tools squashfuse uidmap patchelf" >&2; exit 1; }
done

# shellcheck disable=SC2016  # apt's own format
mirror=$(apt-get indextargets --format '$(SITE)' | grep -v security | head -n 1)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" >"$state/sources"
mkdir -p "$state"/lists/partial "$state"/cache/archives/partial "$state"/packages
unstable=(apt-get -qq -o Dir::Etc::SourceList="$state/sources" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$state/lists"
    -o Dir::Cache="$state/cache" -o APT::Sandbox::User=root -o Acquire::Check-Valid-Until=false)
"${unstable[@]}" update
(cd "$state/packages" && "${unstable[@]}" download apptainer libc6 libseccomp2 libsqlite3-0)
for package in "$state"/packages/*.deb; do dpkg-deb -x "$package" "$target"; done

# It must find that C library, and not the machine's. RPATH rather than RUNPATH, so that libraries of libraries do too.
libraries=$target/usr/lib/x86_64-linux-gnu
for program in "$target/usr/bin/apptainer" "$libraries/apptainer/bin/starter"; do
    patchelf --set-interpreter "$libraries/ld-linux-x86-64.so.2" "$program"
    patchelf --force-rpath --set-rpath "$libraries" "$program"
done
# Moved from /, its parts look for etc and var beside themselves.
for place in usr usr/lib; do
    ln -sfnr "$target/etc" "$target/$place/etc"
    ln -sfnr "$target/var" "$target/$place/var"
done
mkdir -p "$target/var/lib/apptainer/mnt/session"
"$target/usr/bin/apptainer" --version
