"""Flannel's firewall rules, in iptables or nftables. Start reading at choose.py."""
