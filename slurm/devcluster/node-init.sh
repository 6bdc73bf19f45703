#!/bin/bash
# Process 1 of one node of a private cluster: node-init.sh DIRECTORY NODE ADDRESS. Network, host name, mounts,
# processes and shared memory are already private; nothing in this file may change the machine.
set -u
folder=$1 node=$2 address=$3

hostname "$node"
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o mode=1777 tmpfs /dev/shm # shared memory per node, as on real machines

# nodes.py connects the network. (/sys/class/net is no test for it: it still shows the interfaces of the machine.)
for _ in $(seq 500); do
    if ip link show eth0 >/dev/null 2>&1; then break; fi
    sleep 0.01
done
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
ip route add default via "${address%.*}.1"

# slurmd cannot bind its port before an interface has an address.
slurmd -D &

# Process 1 stays and reaps: the node continues when its slurmd is killed.
while :; do
    wait
    sleep 1
done
