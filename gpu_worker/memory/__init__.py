"""The memory manager: KV cache and adapters of any rank in one pool of byte pages.

Integers live here; the one tensor is in `pool.py`.
"""
