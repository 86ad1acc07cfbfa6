"""ONNX graphs: traced from a model class, re-weighted, or with adapters that swap at run time.

Each way takes a ``Request`` and returns what it ``Made`` in the folder that will be published;
``dora_export.api_onnx`` merges before, checks parity after, and publishes.
"""
