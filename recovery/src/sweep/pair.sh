ip() { /bin/ip "$@"; }
tc() { /sbin/tc "$@"; }
# A cable with two ends: v0 here, v1 in a network namespace of its own. What is over it is a tunnel, t0 and t1.
there() { ip netns exec p "$@"; }
pair() {
    head -c 65536 /dev/urandom >/tmp/sent
    echo 1 >/proc/sys/net/ipv6/conf/default/accept_dad
    echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
    ip link set lo up && ip netns add p && there /bin/ip link set lo up &&
        ip link add v0 address 02:00:00:00:00:01 type veth peer name v1 address 02:00:00:00:00:02 netns p &&
        ip addr add 10.1.0.1/24 dev v0 && there /bin/ip addr add 10.1.0.2/24 dev v1 &&
        ip -6 addr add fd00:1::1/64 dev v0 nodad && there /bin/ip -6 addr add fd00:1::2/64 dev v1 nodad &&
        ip link set v0 up && there /bin/ip link set v1 up && answers 10.1.0.2
}
# Waits for an answer of this address.
answers() {
    for i in 1 2 3 4 5 6 7 8 9 10; do
        ping -q -c 1 -W 1 $1 && return 0
        sleep 0.2
    done
    return 1
}
pings() { ping -q -c 10 -i 0.02 -W 2 -s 56 $1 && ping -q -c 5 -i 0.02 -W 2 -s 1200 $1; }
# 64 KiB to this address, and what arrives there compared.
stream() {
    rm -f /tmp/got
    # As soon as its input ends it says so, and the other one ends without having sent all.
    sleep 30 | there nc -l -p 7000 >/tmp/got &
    nc=$!
    for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        timeout 20 nc -w 5 $1 7000 </tmp/sent && break
        sleep 0.1
    done
    for i in 1 2 3 4 5 6 7 8 9 10; do
        kill -0 $nc 2>/dev/null || break
        sleep 0.1
    done
    kill $nc 2>/dev/null
    cmp /tmp/sent /tmp/got
}
