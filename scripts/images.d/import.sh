# `scripts/images import`: an operator's cloud image becomes a raw disk, a kernel, an initrd and a cloud-init seed. No root
# is needed: ext4 is read with debugfs, the seed is written with mtools.

# in_ext4 IMAGE OFFSET COMMAND: debugfs on the file system at that offset; nothing when there is none.
in_ext4() {
  debugfs -R "$3" "$1?offset=$2" 2>/dev/null || true
}

# newest IMAGE OFFSET FOLDER PREFIX: the newest file of that name in the folder (regular files alone).
newest() {
  in_ext4 "$1" "$2" "ls -p $3" | awk -F/ -v p="$4" '$3 ~ /^10/ && index($6, p) == 1 { print $6 }' | sort -V | tail -n 1
}

import_image() {
  local file= out= key= user=ubuntu ip= name format
  while [ $# -gt 0 ]; do
    case $1 in
      --out | --ssh-key | --user | --ip)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in --out) out=$2 ;; --ssh-key) key=$2 ;; --user) user=$2 ;; --ip) ip=$2 ;; esac
        shift
        ;;
      -*) die "unknown option '$1': --out, --ssh-key, --user or --ip" ;;
      *)
        [ -z "$file" ] || die "one image at a time"
        file=$1
        ;;
    esac
    shift
  done
  [ -n "$file" ] || die "which image? scripts/images import FILE [--ssh-key FILE.pub]"
  [ -f "$file" ] || die "$file: no such file"
  [ -z "$key" ] || [ -f "$key" ] || die "$key: no such file"
  [[ $user =~ ^[a-z_][a-z0-9_-]*$ ]] || die "'$user' is no user name"
  [[ -z $ip || $ip =~ ^[0-9.]+/[0-9]+,[0-9.]+$ ]] || die "--ip: ADDR/LEN,GATEWAY, not '$ip'"
  need qemu-img debugfs partx mkfs.vfat mcopy
  name=$(basename "${file%.*}")
  out=${out:-$images/$name}
  mkdir -p "$out"
  out=$(cd "$out" && pwd)

  # qcow2 is known by its magic; whatever else is taken as raw, never guessed from its content.
  format=raw
  [ "$(head -c 3 "$file")" != QFI ] || format=qcow2
  echo "images: converting $file ($format) to $out/disk.raw" >&2
  qemu-img convert -f "$format" -O raw -S 4k "$file" "$out/disk.raw"
  take_kernel "$out"
  write_seed "$out" "$user" "$key" "$ip" "$name"
  cat <<END
cloud-hypervisor --api-socket $out/api.sock --cpus boot=2 --memory size=2G \\
  --kernel $out/vmlinuz ${initrd:+--initramfs $out/initrd }\\
  --cmdline "console=ttyS0 root=$root rw net.ifnames=0" \\
  --disk path=$out/disk.raw path=$out/seed.img,readonly=on \\
  --net tap=tap0 --serial tty --console off
END
}

# take_kernel DIR: DIR/vmlinuz and DIR/initrd out of DIR/disk.raw; sets root (the guest's root device) and initrd.
take_kernel() {
  local disk=$1/disk.raw number start folder kernel= from=
  root= initrd=
  while read -r number start; do
    local offset=$((start * 512)) device=/dev/vda$number
    [ "$number" != 0 ] || device=/dev/vda
    if [ -z "$root" ] && in_ext4 "$disk" "$offset" "ls -p /etc" | grep -q '/fstab/'; then root=$device; fi
    # A partition of its own for /boot has the kernel at its top.
    for folder in /boot /; do
      [ -z "$kernel" ] || break
      kernel=$(newest "$disk" "$offset" "$folder" vmlinuz-)
      from="$offset ${folder%/}"
    done
  done < <(partx -g -o NR,START "$disk" 2>/dev/null || true; echo 0 0)
  [ -n "$kernel" ] || die "no ext4 partition with /boot/vmlinuz-VERSION in $disk"
  [ -n "$root" ] || die "no ext4 partition with /etc/fstab in $disk"
  local offset=${from%% *} version=${kernel#vmlinuz-}
  folder=${from#* }
  in_ext4 "$disk" "$offset" "dump $folder/$kernel $1/vmlinuz"
  initrd=$(newest "$disk" "$offset" "${folder:-/}" "initrd.img-$version")
  [ -z "$initrd" ] || in_ext4 "$disk" "$offset" "dump $folder/$initrd $1/initrd"
  [ -s "$1/vmlinuz" ] || die "cannot read $folder/$kernel from $disk"
  echo "images: kernel $version, root $root" >&2
}

# write_seed DIR USER KEYFILE IP NAME: a NoCloud seed (label `cidata`).
write_seed() {
  local dir=$1/seed
  mkdir -p "$dir"
  printf 'instance-id: %s\nlocal-hostname: %s\n' "$5-$(date +%s)" "${5//[^A-Za-z0-9-]/-}" >"$dir/meta-data"
  {
    printf '#cloud-config\nusers:\n  - name: %s\n    shell: /bin/bash\n    sudo: ALL=(ALL) NOPASSWD:ALL\n' "$2"
    [ -z "$3" ] || printf '    ssh_authorized_keys:\n      - %s\n' "$(head -n 1 "$3")"
  } >"$dir/user-data"
  {
    printf 'version: 2\nethernets:\n  eth0:\n    match: {name: "e*"}\n'
    if [ -n "$4" ]; then
      printf '    addresses: [%s]\n    routes: [{to: default, via: %s}]\n' "${4%,*}" "${4#*,}"
    else
      printf '    dhcp4: true\n'
    fi
  } >"$dir/network-config"
  rm -f "$1/seed.img"
  truncate -s 1M "$1/seed.img"
  mkfs.vfat -n CIDATA "$1/seed.img" >/dev/null
  mcopy -i "$1/seed.img" "$dir"/{meta-data,user-data,network-config} ::
  rm -r "$dir"
}
