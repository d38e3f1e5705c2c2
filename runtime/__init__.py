"""Model package -> tokens. Light: onnxruntime, onnxruntime-genai, tokenizers, numpy."""
