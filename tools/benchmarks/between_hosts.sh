#!/bin/sh
# Hand-over of KV between two network namespaces of this machine, beside iperf3. Needs root, ip and iperf3.
#
#     tools/benchmarks/between_hosts.sh [PYTHON] [--repeats 15 ...: options of `main.py bench handover`]
#
# PYTHON is one with NIXL, such as .venv-nixl/bin/python (`make test-nixl` makes it). Each side gets no core of its own.
set -eu
python=${1:-.venv-nixl/bin/python}
[ $# -eq 0 ] || shift
a=baton-a-$$ b=baton-b-$$
clean() { ip netns del $a 2>/dev/null || true; ip netns del $b 2>/dev/null || true; }
trap clean EXIT
ip netns add $a
ip netns add $b
ip -n $a link add veth0 type veth peer name veth0 netns $b
ip -n $a address add 10.77.0.1/24 dev veth0
ip -n $b address add 10.77.0.2/24 dev veth0
for each in $a $b; do ip -n $each link set lo up; ip -n $each link set veth0 up; done

tcp() {
    ip netns exec $a iperf3 --server --one-off >/dev/null &
    sleep 1  # until it listens
    ip netns exec $b iperf3 --client 10.77.0.1 --time 5 --format g | grep -E 'sender|receiver'
}
echo "iperf3, one connection:"
tcp
ip netns exec $a "$python" main.py bench handover --host 10.77.0.1 --through "ip netns exec $b" \
    --transport frames_tcp --transport nixl "$@"
echo "iperf3 again:"
tcp
