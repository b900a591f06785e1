"""`align doctor`: what of this machine and environment would stop a run. command.py is the door."""
