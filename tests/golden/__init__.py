"""Golden cases: recorded outputs of the official implementations, replayed through this one."""
