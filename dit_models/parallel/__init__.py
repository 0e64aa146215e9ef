"""Training on several processes: the mesh, FSDP2 and expert sharding, checkpoints, faults."""
