"""Devices and hosts: the mesh and its sharding rules, collectives, and multi-process runs."""
