"""Source documents: what people download, read as texts and pictures in reading order."""
