"""What is done with a trained run beside judging it: cleaning its data, inverting its network."""
