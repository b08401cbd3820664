# The quick guest: busybox in an initrd, on the Debian guest's kernel. No disk is needed.

build_quick() {
  local out=$1 work version
  work=$(mktemp -d -p "$out")
  mkdir "$work/kernel" "$work/initrd"
  # The modules are in the Debian guest's initrd already.
  (cd "$work/kernel" && lz4 -dcq "$images/guest/initrd" | cpio --quiet -id 'lib/*')
  cp -a "$work/kernel/lib" "$work/initrd/"
  busybox_root "$work/initrd"
  mkdir -p "$work/initrd/www" "$work/initrd/etc/acpi"
  echo 'quick guest' >"$work/initrd/www/index.html"
  install -m 755 "$parts/quick.initrd" "$work/initrd/init"
  pack_initrd "$work/initrd" "$out/initrd"
  rm -rf "$work"
}
