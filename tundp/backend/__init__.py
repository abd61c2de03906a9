"""What carries packets between subnets. Start reading at base.py."""
