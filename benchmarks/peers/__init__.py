"""The contenders that are not the toolkit: each module is a process, started with a workload and a file for its record.

They import torch and their own library only, so that each can run in an environment of its own.
"""
