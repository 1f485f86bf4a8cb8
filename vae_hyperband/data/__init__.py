"""Images: files, splits and batches."""
