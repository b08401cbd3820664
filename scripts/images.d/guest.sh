# The Debian guest: the stock cloud kernel, a small initrd, and a root disk (one ext4 file system, no partitions) with
# systemd, sshd, redis (every write flushed), iperf3, fio and a small C compiler. root logs in by the key that is made with each build.

build_guest() {
  local out=$1 work
  work=$(mktemp -d -p "$out")
  mkdir "$work/kernel" "$work/initrd"
  kernel_hook linux-image-cloud-amd64 "$work/kernel" >"$work/hook"
  bootstrap "$work/root" \
    systemd,systemd-sysv,udev,dbus,openssh-server,iproute2,iputils-ping,procps,kmod,pciutils,e2fsprogs,iperf3,fio,tcc,redis-server \
    --customize-hook="sh $work/hook"

  cp "$work/kernel/boot/vmlinuz-"* "$out/vmlinuz"
  unpack_vmlinux "$out/vmlinuz" "$out/vmlinux"
  # ext4 is built into the cloud kernel.
  local modules=(virtio_pci virtio_blk virtio_net virtio_console virtio_rng)
  pack_modules "$work/kernel" "$work/root" "${modules[@]}" virtio_balloon button evdev vsock vmw_vsock_virtio_transport \
    overlay loop fuse isofs vfat nls_cp437 nls_ascii autofs4 dm_mod
  pack_modules "$work/kernel" "$work/initrd" "${modules[@]}" button evdev
  busybox_root "$work/initrd"
  mkdir "$work/initrd/new"
  install -m 755 "$parts/guest.initrd" "$work/initrd/init"
  pack_initrd "$work/initrd" "$out/initrd"

  ssh-keygen -q -t ed25519 -N '' -C guest -f "$out/key"
  guest_settings "$work/root" "$out/key.pub"
  ext4_image "$work/root" "$out/disk.img" 384
  e2fsck -fn "$out/disk.img"
  rm -rf "$work"
}

# guest_settings ROOT KEY: network, services, login.
guest_settings() {
  local root=$1 unit
  echo guest >"$root/etc/hostname"
  echo '127.0.0.1 localhost guest' >"$root/etc/hosts"
  : >"$root/etc/fstab" # the initrd mounts the root, whatever its device
  install -d -m 700 "$root/root/.ssh"
  install -m 600 "$2" "$root/root/.ssh/authorized_keys"
  printf 'PermitRootLogin prohibit-password\nPasswordAuthentication no\nUseDNS no\nUsePAM no\nPrintMotd no\nLoginGraceTime 0\n' \
    >"$root/etc/ssh/sshd_config.d/guest.conf"
  install -D -m 644 /dev/stdin "$root/etc/systemd/journald.conf.d/guest.conf" <<<$'[Journal]\nStorage=volatile'
  # A static address; `ip=` on the kernel command line goes before it (systemd-network-generator).
  printf '[Match]\nName=eth0 en*\n[Network]\nAddress=192.168.100.2/24\nGateway=192.168.100.1\nLinkLocalAddressing=no\n' \
    >"$root/etc/systemd/network/99-guest.network"
  printf 'bind 0.0.0.0\nprotected-mode no\nappendonly yes\nappendfsync always\nsave ""\n' >>"$root/etc/redis/redis.conf"
  # Echo on TCP port 7 and an iperf3 server.
  printf '[Socket]\nListenStream=7\nAccept=yes\nMaxConnections=64\n[Install]\nWantedBy=sockets.target\n' \
    >"$root/etc/systemd/system/echo.socket"
  printf '[Service]\nExecStart=/bin/cat\nStandardInput=socket\n' >"$root/etc/systemd/system/echo@.service"
  printf '[Service]\nExecStart=/usr/bin/iperf3 -s\nRestart=always\n[Install]\nWantedBy=multi-user.target\n' \
    >"$root/etc/systemd/system/iperf3-server.service"
  chroot "$root" systemctl enable systemd-networkd systemd-network-generator ssh redis-server echo.socket iperf3-server
  # What no test needs and what takes time in the nested bed.
  chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer e2scrub_all.timer \
    e2scrub_reap.service systemd-networkd-wait-online.service iperf3.service getty@tty1.service systemd-binfmt.service \
    proc-sys-fs-binfmt_misc.automount systemd-update-utmp.service systemd-update-utmp-runlevel.service \
    systemd-pstore.service systemd-journal-flush.service sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount \
    dev-mqueue.mount modprobe@.service systemd-modules-load.service systemd-remount-fs.service systemd-pcrphase.service \
    systemd-pcrphase-sysinit.service
  rm -rf "$root/var/log/journal"
  rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/*.log "$root"/etc/machine-id
  : >"$root/etc/machine-id"
}
