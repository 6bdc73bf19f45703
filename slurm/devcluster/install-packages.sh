#!/bin/bash
# Install the packages of Debian or Ubuntu that slurm/devcluster needs: SLURM, munge and the MariaDB server.
# It must never leave a daemon running or enabled: the private cluster starts its own in its own directory.
set -euo pipefail

# Single packages without recommends: `slurm-wlm` and `mariadb-server` would install four times as many.
# mariadb-client-core has my_print_defaults, which mariadb-install-db calls.
packages=(slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core iproute2 util-linux)

if [ "$(id -u)" != 0 ]; then
    echo "install-packages.sh: must run as root (sudo bash $0), because apt-get changes the system" >&2
    exit 2
fi
if ! command -v apt-get >/dev/null; then
    echo "install-packages.sh: no apt-get on this machine: install these packages yourself: ${packages[*]}" >&2
    exit 2
fi

# Debian starts the daemon of a package after installing it, unless policy-rc.d exits with 101.
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
apt-get update -qq || echo "install-packages.sh: apt-get update failed; using the existing package lists" >&2
apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${packages[@]}" </dev/null

if [ -d /run/systemd/system ]; then
    systemctl disable --quiet slurmctld slurmd slurmdbd munge || true
fi
