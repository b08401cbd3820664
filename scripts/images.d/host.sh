# The nested host: the stock kernel, an initrd that mounts a read-only root under a RAM overlay, and that root. It has no
# init system: the initrd hands over to the bed's own init (scripts/bed2.d/init), which comes with each run.

build_host() {
  local out=$1 work
  work=$(mktemp -d -p "$out")
  mkdir "$work/kernel" "$work/initrd"
  kernel_hook linux-image-amd64 "$work/kernel" >"$work/hook"
  bootstrap "$work/root" \
    kmod,iproute2,iputils-ping,procps,openssh-client,e2fsprogs,qemu-system-x86,qemu-utils,fio,iperf3,redis-tools,netcat-openbsd,socat,tcpdump,strace,jq \
    --customize-hook="sh $work/hook"

  pack_modules "$work/kernel" "$work/root" virtio_pci virtio_blk virtio_net virtio_console virtio_rng \
    kvm kvm-amd ccp irqbypass tun bridge veth vhost_net dummy sch_netem sch_tbf sch_ingress act_mirred cls_matchall \
    ext4 overlay loop 9p 9pnet_virtio vfat nls_cp437 nls_ascii tcp_diag inet_diag isofs
  pack_modules "$work/kernel" "$work/initrd" virtio_pci virtio_blk ext4 overlay 9p 9pnet_virtio
  busybox_root "$work/initrd"
  mkdir "$work/initrd/new"
  install -m 755 "$parts/host.initrd" "$work/initrd/init"

  mkdir -p "$work/root"/{bed,images,bin.d,out}
  echo 'host' >"$work/root/etc/hostname"
  rm -rf "$work/root"/var/lib/apt/lists/* "$work/root"/var/cache/apt/*
  # Unpacked here, it boots two seconds sooner there.
  unpack_vmlinux "$work/kernel/boot/vmlinuz-"* "$out/vmlinux"
  pack_initrd "$work/initrd" "$out/initrd"
  ext4_image "$work/root" "$out/root.img" 16 -O ^has_journal
  rm -rf "$work"
}
