"""Model package -> tokens. Light: onnxruntime-genai, tokenizers, numpy."""
