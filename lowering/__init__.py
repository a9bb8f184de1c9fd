"""Where passes meet ExecuTorch: one file a backend, registration, and lower()."""
