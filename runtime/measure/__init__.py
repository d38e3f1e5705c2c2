"""What parity means, and the replay of a package's certificate, with numpy and onnxruntime."""
