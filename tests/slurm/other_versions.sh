#!/bin/bash
# other_versions.sh SUITE ROOT COMMAND...: runs a command of this repository with the Slurm of another Debian suite, e.g.
#     tests/slurm/other_versions.sh trixie /var/tmp/trixie python -m pytest tests/slurm/test_submit.py
# trixie has Slurm 24.11, sid that of the day. The first time, ROOT becomes a chroot of the suite, from the mirror that apt
# uses (half a minute, 400 MB). Python and its packages are those of this machine: the active virtual environment, or
# the one named by PYTHON; a newer C library runs older programs, and the libraries that the suite lacks are copied.
# The mounts are private and end with the command. Needs root and mmdebstrap.
set -euo pipefail
suite=$1 root=$(realpath -m "$2")
shift 2
repository=$(realpath "$(dirname "$0")/../..")
python=${PYTHON:-$(command -v python3)}
places=$("$python" -c 'import sys; print(sys.prefix, sys.base_prefix, sep="\n")')
environment=$(head -n 1 <<<"$places") installation=$(tail -n 1 <<<"$places")

if [ ! -e "$root/usr/sbin/slurmctld" ]; then
    # shellcheck disable=SC2016  # apt's own format
    mirror=$(apt-get indextargets --format '$(SITE)' | grep debian | grep -v security | head -n 1)
    mmdebstrap --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=slurmctld,slurmd,slurm-client,munge,procps,iproute2,git,libgomp1 "$suite" "$root" \
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
fi
if [ ! -e "$root/etc/ld.so.conf.d/zz-other.conf" ]; then
    # What Python's parts are linked to and the suite has no more, under the name that they look for.
    mkdir -p "$root/usr/local/lib/other"
    { find "$environment" "$installation" -name '*.so*' -type f -print0; printf '%s\0' "$python"; } |
        { xargs -0 ldd 2>/dev/null || :; } | awk '$2 == "=>" && $3 ~ /^\/(usr\/)?lib/ { print $1, $3 }' | sort -u |
        while read -r name file; do
            [ -e "$root/usr/lib/$(uname -m)-linux-gnu/$name" ] || cp "$file" "$root/usr/local/lib/other/$name"
        done
    echo /usr/local/lib/other >"$root/etc/ld.so.conf.d/zz-other.conf"
    chroot "$root" ldconfig
fi

# shellcheck disable=SC2016  # it expands there
exec unshare --mount --propagation private bash -euc '
root=$1 repository=$2 environment=$3 installation=$4
shift 4
for place in /proc /dev /sys "$installation" "$environment" "$repository"; do
    mkdir -p "$root$place"
    mount --rbind "$place" "$root$place"
done
cp /etc/hosts "$root/etc/"
# Nothing of the job or the cluster that this may be called from, and no path that the suite lacks.
exec env -u LD_LIBRARY_PATH -u LD_PRELOAD -u TMPDIR PATH="$environment/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
    HOME=/root LC_ALL=C.UTF-8 PYTHONPATH="$repository" \
    chroot "$root" bash -c '\''cd "$0" && exec "$@"'\'' "$repository" "$@"
' bash "$root" "$repository" "$environment" "$installation" "$@"
