"""What corresponds to what (table, ops), where it lies (shards, files), and the streams between. Knows no family."""
