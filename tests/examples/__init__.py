"""Every example runs alone, in a short form, and prints what it promises."""
