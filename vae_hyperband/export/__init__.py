"""What other programs use: ONNX, safetensors, a page for the browser."""
