"""Outputs: staged folders of safetensors with their side files and manifest."""
