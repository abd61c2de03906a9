"""Where leases come from, and who keeps ours: the subnet manager above the stores."""
