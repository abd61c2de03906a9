"""The host-gw backend: kernel routes to the other nodes, on one layer-2 network."""

from tundp.backend.udp.backend import UdpBackend

HostGwBackend = UdpBackend
