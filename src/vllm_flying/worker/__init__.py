"""Worker processes: several stock model runners over one copy of the weights and one KV pool."""
