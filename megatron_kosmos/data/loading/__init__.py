"""Loading: rows in the order of training, collated to batches by worker processes."""
