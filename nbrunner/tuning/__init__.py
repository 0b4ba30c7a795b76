"""Fine-tuning over a swarm: what is taught belongs to the client; the servers' weights stay as they are."""
