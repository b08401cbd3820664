# What commands on a nested host have at hand (bash; each command reads this file first).
#
# Places: /dev/bed/NAME the host's disks; /images/{host,guest,quick}; /out the run's results, shared by all hosts and
# read outside; the project's programs are in PATH. Host a is 192.168.100.11, b is .12 (log channel: 10.99.0.1 and .2);
# the guest is 192.168.100.2, `ssh guest` logs in.

# The Debian guest's command line and the quick guest's.
LEAN='quiet mitigations=off apparmor=0 nowatchdog' # a nested guest is slow enough
GUEST_CMDLINE="console=ttyS0 root=/dev/vda rw net.ifnames=0 $LEAN"
QUICK_CMDLINE="console=ttyS0 ip=192.168.100.2/24 $LEAN"
LOGS=/out/logs
mkdir -p "$LOGS"

say() { echo "[$(cut -d' ' -f1 /proc/uptime)] $*"; }
fail() {
  say "FAILED: $*" >&2
  exit 1
}

# cut_power HOST: the driver ends that host's qemu process.
cut_power() { echo "cut $1" >&3; }

# wait_for SECONDS WHAT COMMAND..: repeats COMMAND until it succeeds.
wait_for() {
  local limit=$1 end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || fail "$what: not within $limit s"
    sleep 0.1
  done
}

# tap NAME: a tap on the VM network.
tap() {
  ip tuntap add "$1" mode tap vnet_hdr
  ip link set "$1" master br0 up
}

# vmm NAME ARGS..: starts a VMM in the background; pid in /run/NAME.pid, API at /run/NAME.sock.
vmm() {
  local name=$1
  shift
  rm -f "/run/$name.sock"
  cloud-hypervisor --api-socket "/run/$name.sock" --log-file "$LOGS/$BED_HOST-$name.log" -v "$@" \
    >"$LOGS/$BED_HOST-$name.out" 2>&1 </dev/null 3>&- &
  echo $! >"/run/$name.pid"
  wait_for 30 "the API of VMM $name" remote "$name" ping
}

# remote NAME COMMAND..: ch-remote for that VMM.
remote() {
  local name=$1
  shift
  ch-remote --api-socket "/run/$name.sock" "$@"
}

# running NAME: is that VMM's process alive?
running() { kill -0 "$(<"/run/$1.pid")" 2>/dev/null; }
ended() { ! running "$1"; }

# open_port PORT: does the guest accept a connection there?
open_port() { timeout 2 bash -c "exec 4<>/dev/tcp/192.168.100.2/$1"; }

# guest_up SECONDS: until root can log in.
guest_up() {
  wait_for "$1" "the guest's ssh port" open_port 22
  wait_for 60 "ssh to the guest" ssh guest true
}

# quick COMMAND: runs a command in the quick guest, prints its output.
quick() { echo "$*; exit" | timeout 10 nc -N 192.168.100.2 2323; }

# ft_state NAME: FT's state there.
ft_state() { remote "$1" ft info --json | jq -r .state; }
ft_is() { [ "$(ft_state "$1")" = "$2" ]; }
