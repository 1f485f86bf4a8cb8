"""What is learned, and the loss."""
