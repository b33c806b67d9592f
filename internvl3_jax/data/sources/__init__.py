"""Sources of training rows: meta JSON, JSONL files, tar archives, and their mixture."""
