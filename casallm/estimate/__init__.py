"""What a run will cost: parameters, FLOPs, bytes, seconds and dollars. No torch, no network."""
