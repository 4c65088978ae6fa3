#!/usr/bin/env bash
# Two hosts with a network between them, on one machine: network namespaces with names of their own. Needs root and iproute2.
#   hosts.sh up | down | cut | mend | run n1 COMMAND…
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "$0: needs root" >&2 && exit 1; }
command -v ip >/dev/null || { echo "$0: there is no ip here; install iproute2" >&2 && exit 1; }
case "${1:-}" in
up)
    for number in 1 2; do
        ip netns add "n$number"
        mkdir -p "/etc/netns/n$number"
        printf '127.0.0.1 localhost\n10.77.0.1 n1\n10.77.0.2 n2\n' >"/etc/netns/n$number/hosts"
        ip -n "n$number" link set lo up
    done
    ip link add lan0 netns n1 type veth peer name lan0 netns n2
    for number in 1 2; do
        ip -n "n$number" address add "10.77.0.$number/24" dev lan0
        ip -n "n$number" link set lan0 up
    done
    ;;
down)
    for number in 1 2; do
        ip netns delete "n$number" 2>/dev/null || true
        rm -rf "/etc/netns/n$number"
    done
    ;;
cut) ip -n n2 link set lan0 down ;;
mend) ip -n n2 link set lan0 up ;;
run)
    export GLOO_SOCKET_IFNAME=lan0
    # Not `ip netns exec`: that mounts a /sys of its own, in which slurmd finds no cgroups.
    inside='mount --bind "/etc/netns/$0/hosts" /etc/hosts && hostname "$0" && exec "$@"'
    exec nsenter --net="/run/netns/$2" unshare --uts --mount sh -c "$inside" "$2" "${@:3}"
    ;;
*)
    sed -n '2,3p' "$0" >&2
    exit 2
    ;;
esac
