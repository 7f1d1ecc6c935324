"""Many videos by one command: python -m wan.batch."""
