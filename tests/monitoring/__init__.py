"""The Monitor: what it records, measures, writes and draws."""
