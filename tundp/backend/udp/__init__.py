"""flannel's udp backend: a TUN device, an engine and UDP sockets on the underlay."""
