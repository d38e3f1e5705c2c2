"""What parity means, and the replay of a package's certificate: numpy and onnxruntime."""
