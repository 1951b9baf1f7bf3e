"""Front ends that talk to a trained model."""
