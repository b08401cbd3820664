//! The backend of a network device: a tap of the host.
//!
//! A tap that exists by that name (made by `ip tuntap`) is used; otherwise one is made, which is gone when it is
//! closed. Frames that the kernel does not take because the tap's send buffer is full stay in the guest's queue until
//! there is room; frames sent while the interface is down are lost.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::Error;
use crate::backend::{NetBackend, VNET_HEADER_SIZE};

/// Name of a tap that gets none: the kernel puts a number in.
const AUTO_NAME: &str = "vmtap%d";

/// How a tap is opened.
#[derive(Debug, Clone, Default)]
pub struct TapOptions {
    /// Name; one is chosen when not given.
    pub name: Option<String>,
    /// Address on the host; left as it is when not given.
    pub ip: Option<IpAddr>,
    /// Netmask of `ip`.
    pub mask: Option<IpAddr>,
    /// MAC address on the host; left as it is when not given.
    pub host_mac: Option<[u8; 6]>,
    /// MTU on the host; left as it is when not given.
    pub mtu: Option<u16>,
}

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero.
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is not an interface name"),
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// An ioctl that takes or fills `argument`.
fn ioctl<T>(fd: RawFd, code: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: each caller passes the type that the code wants; the kernel writes within it.
    if unsafe { libc::ioctl(fd, code, std::ptr::from_mut(argument)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn socket(family: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: plain socket(2).
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn ipv4(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: all-zero bytes are a valid sockaddr.
    let mut sockaddr: libc::sockaddr = unsafe { std::mem::zeroed() };
    sockaddr.sa_family = libc::AF_INET as libc::sa_family_t;
    // struct sockaddr_in: two bytes of port, then the address.
    for (to, from) in sockaddr.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    sockaddr
}

impl Tap {
    /// Opens or makes a tap and brings it up.
    pub fn open(options: &TapOptions) -> Result<Self, Error> {
        let name = options.name.as_deref().filter(|n| !n.is_empty()).unwrap_or(AUTO_NAME);
        let error = |what: &str| {
            let what = format!("tap {name}: {what}");
            move |source| Error::Backend { what, source }
        };
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(error("cannot open /dev/net/tun (is the module tun there?)"))?;
        let mut interface = request(name).map_err(error("name"))?;
        interface.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut interface).map_err(error(
            "cannot be used (in use, of several queues, of another kind, or no right to make it)",
        ))?;
        let mut header = VNET_HEADER_SIZE as libc::c_int;
        ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &mut header).map_err(error("vnet header size"))?;
        // SAFETY: the kernel left a NUL-terminated name of at most IFNAMSIZ bytes.
        let name_text = unsafe { CStr::from_ptr(interface.ifr_name.as_ptr()) };
        let mut tap = Self {
            file,
            name: name_text.to_string_lossy().into_owned(),
        };
        tap.set_offloads(0).map_err(error("offloads"))?;
        tap.configure(options).map_err(error("cannot be set up"))?;
        Ok(tap)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn configure(&self, options: &TapOptions) -> io::Result<()> {
        let control = socket(libc::AF_INET)?;
        let fd = control.as_raw_fd();
        if let Some(mac) = options.host_mac {
            let mut interface = request(&self.name)?;
            // SAFETY: all-zero bytes are a valid sockaddr.
            let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
            address.sa_family = libc::ARPHRD_ETHER;
            for (to, from) in address.sa_data.iter_mut().zip(mac) {
                *to = from as libc::c_char;
            }
            interface.ifr_ifru.ifru_hwaddr = address;
            ioctl(fd, libc::SIOCSIFHWADDR, &mut interface)?;
        }
        if let Some(mtu) = options.mtu {
            let mut interface = request(&self.name)?;
            interface.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
            ioctl(fd, libc::SIOCSIFMTU, &mut interface)?;
        }
        match (options.ip, options.mask) {
            (Some(IpAddr::V4(ip)), mask) => {
                let mut interface = request(&self.name)?;
                interface.ifr_ifru.ifru_addr = ipv4(ip);
                ioctl(fd, libc::SIOCSIFADDR, &mut interface)?;
                if let Some(IpAddr::V4(mask)) = mask {
                    let mut interface = request(&self.name)?;
                    interface.ifr_ifru.ifru_netmask = ipv4(mask);
                    ioctl(fd, libc::SIOCSIFNETMASK, &mut interface)?;
                }
            }
            (Some(IpAddr::V6(ip)), mask) => self.add_ipv6(ip, mask)?,
            (None, _) => {}
        }
        let mut interface = request(&self.name)?;
        ioctl(fd, libc::SIOCGIFFLAGS, &mut interface)?;
        // SAFETY: SIOCGIFFLAGS filled this field.
        let flags = unsafe { interface.ifr_ifru.ifru_flags };
        if flags & libc::IFF_UP as libc::c_short == 0 {
            interface.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
            ioctl(fd, libc::SIOCSIFFLAGS, &mut interface)?;
        }
        Ok(())
    }

    fn add_ipv6(&self, ip: std::net::Ipv6Addr, mask: Option<IpAddr>) -> io::Result<()> {
        let control = socket(libc::AF_INET6)?;
        let mut interface = request(&self.name)?;
        ioctl(control.as_raw_fd(), libc::SIOCGIFINDEX, &mut interface)?;
        // SAFETY: SIOCGIFINDEX filled this field.
        let index = unsafe { interface.ifr_ifru.ifru_ifindex };
        let prefix = match mask {
            Some(IpAddr::V6(mask)) => u128::from(mask).leading_ones(),
            _ => 64,
        };
        let mut address = libc::in6_ifreq {
            ifr6_addr: libc::in6_addr { s6_addr: ip.octets() },
            ifr6_prefixlen: prefix,
            ifr6_ifindex: index,
        };
        match ioctl(control.as_raw_fd(), libc::SIOCSIFADDR, &mut address) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }
}

impl NetBackend for Tap {
    fn transmit(&mut self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        loop {
            match self.file.write_vectored(frame) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(|_| ()),
            }
        }
    }

    fn receive(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.file.read_vectored(bufs)
    }

    fn poll_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn set_offloads(&mut self, tun_flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        if unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(tun_flags),
            )
        } < 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
