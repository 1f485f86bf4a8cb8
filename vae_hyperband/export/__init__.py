"""Models for other programs: ONNX, safetensors, a page for the browser."""
