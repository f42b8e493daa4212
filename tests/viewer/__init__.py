"""The graph viewer: what is collected, the page, and the page in a browser."""
