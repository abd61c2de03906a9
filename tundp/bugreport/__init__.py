"""`tundp bugreport`: what is known of one node, in one archive without secrets."""
