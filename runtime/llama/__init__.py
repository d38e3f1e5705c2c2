"""A package open in onnxruntime-genai: load, generate, chat."""
