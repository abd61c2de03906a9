"""The cold path to the kernel: TUN, UDP socket, netlink, sysctl, systemd."""
