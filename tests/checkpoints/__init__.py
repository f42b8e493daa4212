"""What save_pretrained writes and load reads."""
