# What the image builders share. Sourced by scripts/images, which sets $repo, $parts and $images.

die() {
  echo "scripts/images: $*" >&2
  exit 1
}

# Says which Debian package brings a missing program.
need() {
  local program package
  for program; do
    command -v "$program" >/dev/null && continue
    case $program in
      busybox) package=busybox-static ;;
      mke2fs | debugfs) package=e2fsprogs ;;
      depmod) package=kmod ;;
      xz) package=xz-utils ;;
      ssh-keygen) package=openssh-client ;;
      qemu-img) package=qemu-utils ;;
      sfdisk) package=fdisk ;;
      partx) package=util-linux ;;
      mkfs.vfat) package=dosfstools ;;
      mcopy) package=mtools ;;
      *) package=$program ;;
    esac
    die "$program is missing: apt-get install $package"
  done
}

# The machine's own Debian sources (other vendors' sources are of other suites) as arguments of mmdebstrap.
debian_sources() {
  local file
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    if [ -f "$file" ] && grep -Eq "^[^#]*(^Suites:|[[:space:]])[[:space:]]*$codename([[:space:]]|\$)" "$file"; then
      echo "$file"
    fi
  done
}

# bootstrap DIR PACKAGES [OPTIONS..]: a Debian of this machine's release in DIR.
bootstrap() {
  local dir=$1 packages=$2 codename config sources
  shift 2
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  mapfile -t sources < <(debian_sources)
  [ ${#sources[@]} -gt 0 ] || die "no apt source of Debian $codename in /etc/apt"
  config=$(mktemp)
  # Proxies and the like; what the chroot's apt needs to reach the same mirror in the same way.
  apt-config dump Acquire >"$config"
  mmdebstrap --mode=root --variant=minbase --aptopt="$config" --dpkgopt=force-unsafe-io \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --include="$packages" "$@" "$codename" "$dir" "${sources[@]}"
  rm -f "$config"
}

# The hook that brings the newest package behind kernel metapackage $1, unpacked, to $2.
kernel_hook() {
  cat <<END
set -eu
cd "$2"
export APT_CONFIG=\$MMDEBSTRAP_APT_CONFIG
package=\$(apt-cache depends "$1" | sed -n 's/^ *Depends: *\\(linux-image-[0-9].*\\)/\\1/p' | head -n 1)
apt-get -o APT::Sandbox::User=root download "\$package"
dpkg-deb -x "\$package"_*.deb .
[ -d lib/modules ] || ln -s usr/lib lib
rm -- *.deb
END
}

# kernel_version TREE
kernel_version() {
  basename "$1"/boot/vmlinuz-* | sed 's/^vmlinuz-//'
}

# pack_modules TREE DEST MODULE..: copies the modules, and what they depend on, to DEST/lib/modules (those that are
# built into the kernel need no file).
pack_modules() {
  local tree=$1 dest=$2 version module file
  shift 2
  version=$(kernel_version "$tree")
  [ -f "$tree/lib/modules/$version/modules.dep.bin" ] || depmod -b "$tree" "$version"
  for module; do
    modprobe -d "$tree" -S "$version" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
  done | sort -u | while read -r file; do
    install -D -m 644 "$file" "$dest/lib/modules/$version/${file#*/lib/modules/"$version"/}"
  done
  cp "$tree/lib/modules/$version/"modules.{builtin,order,builtin.modinfo} "$dest/lib/modules/$version/"
  depmod -b "$dest" "$version"
}

# busybox_root DIR: a root folder with busybox and its applets.
busybox_root() {
  mkdir -p "$1"/{bin,dev,proc,sys,run,tmp,root,etc,mnt}
  cp "$(command -v busybox)" "$1/bin/busybox"
  "$1/bin/busybox" --list | while read -r applet; do
    [ "$applet" = busybox ] || ln -s busybox "$1/bin/$applet"
  done
  ln -s bin "$1/sbin"
}

# pack_initrd DIR FILE
pack_initrd() {
  (cd "$1" && find . | cpio --quiet -o -H newc -R 0:0) | lz4 -l -9 -q - "$2"
}

# unpack_vmlinux BZIMAGE FILE: takes the ELF kernel out of a bzImage: the boot protocol's header says where the
# compressed payload is; its last 4 bytes are the unpacked size.
unpack_vmlinux() {
  local sectors offset length magic
  sectors=$(od -An -tu1 -j $((0x1f1)) -N1 "$1")
  offset=$(od -An -tu4 -j $((0x248)) -N4 "$1")
  length=$(od -An -tu4 -j $((0x24c)) -N4 "$1")
  payload() { tail -c +$(((sectors + 1) * 512 + offset + 1)) "$1" | head -c $((length - 4)); }
  magic=$(payload "$1" | od -An -tx1 -N4 | tr -d ' ')
  case $magic in
    02214c18) payload "$1" | lz4 -dcq >"$2" ;;
    fd377a58) payload "$1" | xz -dc >"$2" ;;
    28b52ffd) payload "$1" | zstd -dcq >"$2" ;;
    1f8b*) payload "$1" | gzip -dc >"$2" ;;
    *) die "$1: unknown kernel compression $magic" ;;
  esac
}

# ext4_image DIR FILE EXTRA_MIB OPTIONS..: an ext4 file system of DIR's files with EXTRA_MIB to spare; sparse.
ext4_image() {
  local dir=$1 file=$2 size
  size=$(($(du -sm --apparent-size "$dir" | cut -f1) * 115 / 100 + $3))
  shift 3
  truncate -s "${size}M" "$file"
  mke2fs -q -F -t ext4 -d "$dir" -m 0 "$@" "$file"
}
