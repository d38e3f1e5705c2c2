"""Model package -> tokens. Light: onnxruntime, onnxruntime-genai, tokenizers, jinja2, numpy."""
