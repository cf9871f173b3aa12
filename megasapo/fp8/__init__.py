"""Numbers in eight bits: formats, casts that saturate, and scales by blocks.

Pure torch on any device, shared by the learner's emulation, by publishing, and by the embedded server.
"""
