"""Process groups, devices, stage layout and random streams: everything that knows about ranks."""
