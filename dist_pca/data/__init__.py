"""From shards to batches: the order of samples, reading, decoding, augmentation and collation."""
