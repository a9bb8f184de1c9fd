"""Loading checkpoints, and the decoder's exportable form."""
