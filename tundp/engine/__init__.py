"""What moves the packets. base.py is the contract, reference.py the specification of it."""
