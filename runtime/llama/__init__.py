"""A package opened in onnxruntime-genai: load, generate, chat."""
