# What the kernel is made to do, in the guest.
pings() { ping -c 1 -W 2 10.0.2.2; }
net_up() {
    /bin/ip link set eth0 up && /bin/ip addr add 10.0.2.15/24 dev eth0 || return 1
    for t in $(seq 1 4000); do [ "$(cat /sys/class/net/eth0/carrier)" = 1 ] && break; sleep 0.01; done
    for t in $(seq 1 20); do pings && return 0; done
    return 1
}
# Past what the kernel keeps of a disk.
reads() { dd if=$1 of=/dev/null bs=4096 count=1 iflag=direct; }
plays() { dd if=/dev/zero of=/dev/dsp bs=4096 count=2; }
# A host behind an interface that is not there.
far() {
    /bin/ip link set $1 up && /bin/ip addr add 10.9.0.1/24 dev $1
    /bin/ip neigh replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev $1
}
sends() { (ping -c 1 -W 1 10.9.0.2 >/dev/null 2>&1 &); sleep 0.02; }
