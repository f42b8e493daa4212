"""The benchmarks, in tiny form."""
