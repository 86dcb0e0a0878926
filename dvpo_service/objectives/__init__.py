"""What the policy is trained for: the preparation of a batch, and the loss of a micro-batch. Plain torch, no Ray."""
