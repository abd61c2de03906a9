"""From one daemon to the next without losing a packet: what is said, by whom, and who goes on.

P, the predecessor, is the daemon that runs; S, its successor, was started by `tundp run --replace`.

    S                                     P
    POST /v1/handover  Hello   ------->   refuses by name (HTTP 409), or
                               <-------   Offer: what it is, and its descriptors
    reads store and host, makes the
    backend and the engine, not attached
                       Ready   ------->   stops its tasks (lease, firewall, files), then its engine
                               <-------   Paused: final counters and lease
    attaches           Attached ------>   the commit: tells systemd, lets go of everything
    starts its tasks           <-------   Gone, and exits

P decides: until it has read Attached it may always go on, says Withdrawn, and S ends. Whoever
finds the other dead goes on alone: S because it has every descriptor, P because it has never
given one away (they are duplicates). Who is silent instead of dead:

    S, before Ready          P waits START_S, carrying packets all the while
    S, between Paused and    P attaches again after SWITCH_S and withdraws; S may say Ready
       Attached              once more: a machine may be busy
    P, before Offer          S ends: it has nothing to go on with
    P, after Ready           S kills it after PAUSE_S (GONE_S after Attached): a control plane that
                             hangs must not wake up beside another one

Never do two engines read one queue but for the moment between a Withdrawn and its reader, and
never do two processes write lease, firewall or files: P's tasks have ended before Paused, S's begin
after Gone.
"""
