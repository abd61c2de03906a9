"""`tundp hold`: the descriptor store and the restarts of systemd, where there is no systemd.

A process of its own, small and older than the daemon it starts: it imports nothing but the standard
library's smallest parts, and knows nothing of packets.

    messages.py   what is sent to NOTIFY_SOCKET, and by whom
    child.py      starts the command with the descriptors kept for it
    holder.py     restarts, watchdog, signals: the loop
"""
