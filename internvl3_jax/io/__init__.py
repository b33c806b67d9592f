"""Reading and writing outside of the process: files, buckets, JSON, command lines and text for a
terminal.
"""
