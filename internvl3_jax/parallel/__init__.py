"""Devices and hosts: the mesh and its rules, collectives, processes that work together."""
