"""Where training rows come from: meta JSON, JSONL files, tar archives, and how they are mixed."""
