"""Decisions. PURE: no I/O, no clock, no randomness, no asyncio, no threads.

What a decision needs (the time, a snapshot of the devices, a random generator) is an argument; what it wants done is its result.
"""
