#!/bin/bash
# Install what slurm/devcluster needs from Debian's or Ubuntu's own packages: SLURM, munge, MariaDB's server program.
# It must never leave a daemon running or enabled: the private cluster starts its own copies under its own directory.
set -euo pipefail

# Named one by one and without recommends: `slurm-wlm` and `mariadb-server` would bring four times as many packages.
# mariadb-client-core carries my_print_defaults, which mariadb-install-db calls.
packages=(slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core iproute2 util-linux)

if [ "$(id -u)" != 0 ]; then
    echo "install-packages.sh: must be root (sudo bash $0), because apt-get installs for the whole machine" >&2
    exit 2
fi
if ! command -v apt-get >/dev/null; then
    echo "install-packages.sh: no apt-get here; install these yourself: ${packages[*]}" >&2
    exit 2
fi

# Debian starts a package's daemon after installing it unless policy-rc.d says 101.
policy=/usr/sbin/policy-rc.d
kept=
restore() {
    rm -f "$policy"
    if [ -n "$kept" ]; then mv "$kept" "$policy"; fi
}
if [ -e "$policy" ]; then
    kept=$policy.devcluster-kept
    mv "$policy" "$kept"
fi
trap restore EXIT
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || echo "install-packages.sh: apt-get update failed; trying with the package lists that are there" >&2
apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${packages[@]}" </dev/null

if [ -d /run/systemd/system ]; then
    systemctl disable --quiet slurmctld slurmd slurmdbd munge || true
fi
