"""The control plane's values: leases, the network config, the table, the FIB. No I/O, no clock."""
