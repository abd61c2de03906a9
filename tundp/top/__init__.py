"""What `tundp top` is made of: rounds of counters and flows, a view of them, text for a screen."""
