"""Measures of a trained model: bounds, latent space, generated images."""
