"""What tests over real engines share: checkpoints made on the spot, servers, references."""
